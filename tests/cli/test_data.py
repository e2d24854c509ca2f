import sys

import pytest
import zstandard

from longshort.cli import main
from longshort.data import DataFolder, load_tokenizer


def test_data_are_prepared_and_described(corpus, tmp_path, capsys):
    assert main(["data", str(corpus), "--out", str(tmp_path / "data")]) == 0
    data = DataFolder.open(tmp_path / "data")
    shown = capsys.readouterr().out
    assert f"{len(data.train):,} tokens" in shown
    assert f"{len(data.validation):,} tokens" in shown
    assert str(tmp_path / "data") in shown.replace("\n", "")


def test_all_settings_arrive(tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(f'{{"body": "the text number {number}"}}\n' for number in range(40)))
    arguments = [
        "--tokenizer",
        "bpe",
        "--vocab-size",
        "270",
        "--text-field",
        "body",
        "--validation-fraction",
        "0.5",
    ]
    assert main(["data", str(source), "--out", str(tmp_path / "data"), *arguments]) == 0
    data = DataFolder.open(tmp_path / "data")
    assert data.train.vocab_size == len(load_tokenizer(data.tokenizer_dir)) == 270
    assert data.train.documents + data.validation.documents == 40
    assert 10 < data.validation.documents < 30


def test_a_seed_chooses_the_validation_documents(corpus, tmp_path):
    chosen = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        assert (
            main(["data", str(corpus), "--out", str(out), "--seed", seed, "--validation-fraction", "0.5"])
            == 0
        )
        chosen.append(DataFolder.open(out).validation.tokens.tolist())
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--out"], "--out"),
        (["--out", "d", "--validation-fraction", "1"], "between 0 and 1, got 1.0"),
        (["--out", "d", "--validation-fraction", "much"], "much"),
        (["--out", "d", "--seed", "-1"], "--seed"),
        (["--out", "d", "--processes", "0"], "--processes"),
        (["--out", "d", "--bpe-sample", "0", "--tokenizer", "bpe"], "--bpe-sample"),
        (["--out", "d", "--bpe-sample", "5"], "--bpe-sample goes with --tokenizer bpe alone, got bytes"),
        (["--out", "d", "--vocab-size", "300"], "--tokenizer bpe alone, got bytes"),
        (["--out", "d", "--tokenizer", "bpe", "--vocab-size", "10"], "--vocab-size"),
        (["one", "two", "--out", "d"], "two"),
    ],
    ids=str,
)
def test_wrong_usage(fails, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(2, "data", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def flawed(tmp_path):
    """A folder with a file that is not text, and a record without text."""
    folder = tmp_path / "flawed"
    folder.mkdir()
    (folder / "a.npz").write_bytes(b"PK\3\4\0")
    records = '{"text": "one"}\n{"text": null}\n{"text": "two"}\n'
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(records.encode()))
    return folder


def test_what_is_left_out_is_told(flawed, tmp_path, capsys):
    assert main(["data", str(flawed), "--out", str(tmp_path / "data")]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = lines.index("left out   0 hidden, 1 not UTF-8 text, 1 without text, 0 empty")
    assert lines[told + 1].startswith(f"           first: {flawed / 'a.npz'} is binary (NUL bytes), not text")
    null = f"{flawed / 'b.jsonl.zst'}, line 2: field 'text' is null, not a string"
    assert lines[told + 2] == f"           first: {null}"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_strict_leaves_out_no_file_and_no_record(fails, flawed, tmp_path, tokenizer):
    flags = ["--out", tmp_path / "data", "--strict", "--tokenizer", tokenizer]
    assert f"{flawed / 'a.npz'} is binary" in fails(1, "data", flawed, *flags)
    null = (
        f"{flawed / 'b.jsonl.zst'}, line 2: field 'text' is null, not a string; strict does not leave it out"
    )
    assert null in fails(1, "data", flawed / "*.zst", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["flawed"]


def test_a_missing_package_is_named_with_its_extra(fails, flawed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    message = fails(1, "data", flawed, "--out", tmp_path / "data")
    assert "needs zstandard: pip install 'longshort[train]'" in message
    assert not (tmp_path / "data").exists()


def test_a_missing_source_is_a_failure(fails, tmp_path):
    message = fails(1, "data", tmp_path / "nowhere", "--out", tmp_path / "data")
    assert "nowhere" in message
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_told_otherwise(corpus, fails, tmp_path):
    out = tmp_path / "data"
    assert main(["data", str(corpus), "--out", str(out)]) == 0
    before = (out / "train.json").read_bytes()
    assert "exists" in fails(1, "data", corpus, "--out", out, "--seed", "5")
    assert (out / "train.json").read_bytes() == before
    assert main(["data", str(corpus), "--out", str(out), "--seed", "5", "--overwrite"]) == 0
    assert (out / "train.json").read_bytes() != before


def test_a_preparation_that_failed_goes_on(fails, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["longshort.data.prepare"], "_PART_CHARACTERS", 10_000)
    monkeypatch.setattr(sys.modules["longshort.data.prepare"], "_PORTION_CHARACTERS", 1_000)
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(f'{{"text": "{"word " * 20}{i}"}}\n' for i in range(500)))
    (source / "b.jsonl").write_text("{broken\n")
    command = ["data", str(source), "--out", str(tmp_path / "data")]
    failure = fails(1, *command)
    assert f"Finished parts are kept in {tmp_path / '.data.preparing'}; the same command goes on." in failure
    assert "b.jsonl, line 1 is not JSON" in failure
    other = fails(1, *command, "--seed", "1")
    assert "an interrupted preparation has other settings: seed was 0, is 1" in other
    assert "kept in" not in other
    (source / "b.jsonl").write_text('{"text": "whole"}\n')
    assert main([*command, "--processes", "2"]) == 0
    assert "tokens were there from before an interruption" in capsys.readouterr().out
    assert not (tmp_path / ".data.preparing").exists()
    assert main(["data", str(source), "--out", str(tmp_path / "again")]) == 0
    for name in ("train.bin", "train.json", "validation.bin", "validation.json"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
