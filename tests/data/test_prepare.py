import itertools
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import longshort
from longshort.data import (
    DataFolder,
    Prepared,
    PreparedSplit,
    Skipped,
    TokenFile,
    load_tokenizer,
    prepare,
    tokenizer_hash,
    train_bpe,
)
from longshort.data.tokenization import Encoder

TEXTS = {f"{i:03}.txt": f"document {i}: größer\n" + "def f(x):\n    return x\n" * (i % 7) for i in range(60)}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "empty.txt").write_text("")
    (folder / "binary").write_bytes(b"\xff\xfe")
    (folder / ".hidden").write_text("hidden")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder to be, whose parent holds nothing else."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / "data"


def documents(token_file: TokenFile, decode: Callable[[list[int]], str]) -> list[str]:
    offsets = token_file.document_offsets
    return [decode(token_file.tokens[a:b].tolist()) for a, b in itertools.pairwise(offsets)]


def splits(data: DataFolder) -> tuple[set[str], set[str]]:
    """The texts of both splits of a folder of bytes, whose documents all end in the end-of-text token."""

    def decode(ids: list[int]) -> str:
        assert ids[-1] == 256
        return bytes(ids[:-1]).decode()

    train, validation = (documents(split, decode) for split in (data.train, data.validation))
    assert len(set(train)) == len(train)
    return set(train), set(validation)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_bytes(corpus: Path, out: Path) -> None:
    prepared = prepare(corpus, out, validation_fraction=0.25)
    data = DataFolder.open(out)
    train, validation = splits(data)
    assert train | validation == set(TEXTS.values())
    assert not train & validation
    assert 5 <= len(validation) <= 25
    assert prepared == Prepared(
        folder=out,
        train=PreparedSplit(len(train), len(data.train), sum(len(text.encode()) for text in train)),
        validation=PreparedSplit(
            len(validation), len(data.validation), sum(len(text.encode()) for text in validation)
        ),
        skipped=Skipped(hidden=1, not_text=1, empty=1, first_not_text=prepared.skipped.first_not_text),
        vocab_size=257,
    )
    assert prepared.train.tokens == prepared.train.bytes + prepared.train.documents
    assert prepared.train.bytes_per_token == prepared.train.bytes / prepared.train.tokens
    assert data.train.source == str(corpus)
    assert data.train.document_bytes.sum() == prepared.train.bytes
    assert data.train.tokens.dtype == np.uint16
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    assert sorted(path.name for path in out.iterdir()) == [
        "tokenizer", "train.bin", "train.json", "validation.bin", "validation.json"
    ]  # fmt: skip


def test_bpe_is_trained_on_the_training_documents_alone(corpus: Path, out: Path) -> None:
    prepared = prepare(corpus, out, tokenizer="bpe", vocab_size=300, validation_fraction=0.25)
    data = DataFolder.open(out)
    tokenizer = load_tokenizer(data.tokenizer_dir)
    eos = str(tokenizer.eos_token)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    train, validation = (documents(split, decode) for split in (data.train, data.validation))
    assert {*train, *validation} == {text + eos for text in TEXTS.values()}
    expected = train_bpe(sorted(text.removesuffix(eos) for text in train), 300)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert (data.train.vocab_size, prepared.vocab_size) == (300, 300)
    assert prepared.train.bytes_per_token > 1.5
    assert data.train.document_bytes.tolist() == [len(text.removesuffix(eos).encode()) for text in train]
    assert data.validation.tokenizer_hash == tokenizer_hash(data.tokenizer_dir)


def test_a_saved_tokenizer(corpus: Path, out: Path, tmp_path: Path) -> None:
    saved = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(TEXTS.values(), 290).backend_tokenizer,
        eos_token="</s>",
        model_max_length=8,
    )
    saved.save_pretrained(tmp_path / "saved")
    prepared = prepare(corpus, out, tokenizer=tmp_path / "saved")
    data = DataFolder.open(out)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.model_max_length > 10**9
    assert prepared.vocab_size == data.train.vocab_size == 291
    train = documents(data.train, lambda ids: str(tokenizer.decode(ids)))
    assert all(text.endswith("</s>") for text in train)
    assert {text.removesuffix("</s>") for text in train} < set(TEXTS.values())


def test_end_of_text_written_in_a_document_is_no_boundary(tmp_path: Path, out: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "a<|endoftext|>b"}\n' * 20)
    for tokenizer in ("bytes", "bpe"):
        prepare(tmp_path / "corpus.jsonl", out, tokenizer=tokenizer, vocab_size=258, overwrite=True)
        data = DataFolder.open(out)
        eos = load_tokenizer(data.tokenizer_dir).eos_token_id
        ends = np.flatnonzero(np.asarray(data.train.tokens) == eos)
        assert (ends + 1).tolist() == data.train.document_offsets[1:].tolist()


def test_the_text_field_is_used(tmp_path: Path, out: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    prepare(tmp_path / "corpus.jsonl", out, text_field="body")
    assert set.union(*splits(DataFolder.open(out))) == {"one", "two"}


def test_a_hugging_face_dataset(tmp_path: Path, out: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS.values())
    )
    calls: list[tuple[str, int, int | None]] = []
    prepare(
        f"hf:{tmp_path / 'dataset'}",
        out,
        tokenizer="bpe",
        vocab_size=280,
        progress=lambda *a: calls.append(a),
    )
    data = DataFolder.open(out)
    assert data.train.documents + data.validation.documents == len(TEXTS)
    total = sum(len(text.encode()) for text in TEXTS.values())
    assert calls == [("training the tokenizer", total, None), ("writing tokens", total, None)]


def test_the_split_hangs_on_seed_and_name_alone(corpus: Path, out: Path) -> None:
    def split(seed: int) -> set[str]:
        prepare(corpus, out, validation_fraction=0.3, seed=seed, overwrite=True)
        return splits(DataFolder.open(out))[1]

    first = split(0)
    assert split(0) == first
    assert split(1) != first
    (corpus / "000.txt").unlink()
    (corpus / "new.txt").write_text("new")
    assert split(0) - {"new"} == first - {TEXTS["000.txt"]}


@pytest.mark.parametrize("fraction", [1e-12, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_each_split_gets_a_document(tmp_path: Path, out: Path, count: int, fraction: float) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(count)))
    for seed in range(5):
        prepare(tmp_path / "corpus.jsonl", out, validation_fraction=fraction, seed=seed, overwrite=True)
        train, validation = splits(DataFolder.open(out))
        assert train | validation == {str(i) for i in range(count)}
        assert train
        assert validation
        if fraction < 0.1:
            assert len(validation) == 1
        if fraction > 0.9:
            assert len(train) == 1


def test_a_larger_fraction_adds_documents_to_the_validation_split(tmp_path: Path, out: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(12)))
    for seed in range(5):
        smaller: set[str] = set()
        for fraction in (1e-12, 0.2, 0.5, 0.8, 1 - 1e-12):
            prepare(tmp_path / "corpus.jsonl", out, validation_fraction=fraction, seed=seed, overwrite=True)
            validation = splits(DataFolder.open(out))[1]
            assert smaller <= validation
            smaller = validation
        assert len(smaller) == 11


def test_documents_of_a_split_keep_their_order(tmp_path: Path, out: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"text": "{i:04}"}}\n' for i in range(3000)))
    prepare(tmp_path / "corpus.jsonl", out, validation_fraction=0.5)
    data = DataFolder.open(out)
    for split in (data.train, data.validation):
        numbers = np.asarray(split.tokens).reshape(-1, 5)[:, :4] - ord("0")
        # One document is held back until both splits have one.
        assert np.sum(np.diff(numbers @ [1000, 100, 10, 1]) < 0) <= 1
    assert 1400 < data.train.documents < 1600


def test_progress_ends_at_the_total(corpus: Path, out: Path) -> None:
    for i in range(4):
        (corpus / f"large{i}.txt").write_text("x" * 1_500_000)
    calls: list[tuple[str, int, int | None]] = []
    prepare(corpus, out, tokenizer="bpe", vocab_size=260, progress=lambda *a: calls.append(a))
    total = sum(path.stat().st_size for path in corpus.iterdir() if not path.name.startswith("."))
    for stage in ("training the tokenizer", "writing tokens"):
        done = [call[1] for call in calls if call[0] == stage]
        assert len(done) >= 4
        assert done == sorted(done)
        assert done[-1] == total
    assert {call[2] for call in calls} == {total}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"validation_fraction": 0},
            ValueError,
            "validation_fraction must be between 0 and 1, both excluded, got 0",
        ),
        ({"validation_fraction": 1.0}, ValueError, "both excluded, got 1.0"),
        ({"validation_fraction": float("nan")}, ValueError, "both excluded, got nan"),
        (
            {"tokenizer": "bpe", "vocab_size": 257},
            ValueError,
            "vocab_size must be at least 258 for BPE, got 257",
        ),
        (
            {"tokenizer": "nowhere"},
            FileNotFoundError,
            "tokenizer must be 'bytes', 'bpe' or a saved tokenizer's folder, got 'nowhere'",
        ),
        ({"source": "nowhere"}, FileNotFoundError, "there is no file or folder 'nowhere'"),
        ({"text_field": ""}, ValueError, "text_field must be the name of a field"),
    ],
)
def test_bad_arguments_are_refused_before_a_file_is_touched(
    corpus: Path, out: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"source": corpus, "out": out} | options
    with pytest.raises(error, match=re.escape(message)):
        prepare(**arguments)
    assert list(out.parent.iterdir()) == []


def test_a_tokenizer_folder_without_tokenizer_is_refused(corpus: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer that loads"):
        prepare(corpus, out, tokenizer=corpus)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_fewer_than_two_documents_are_refused(corpus: Path, out: Path, tokenizer: str) -> None:
    for name in list(TEXTS)[1:]:
        (corpus / name).unlink()
    with pytest.raises(
        ValueError,
        match=r"has 1 documents \(left out: 1 hidden, 1 not UTF-8 text, 0 without text, 1 empty; "
        r"\S+binary is not UTF-8 text \(it has a byte 0xff\); readable: .*\); .*need at least 2",
    ):
        prepare(corpus, out, tokenizer=tokenizer)
    assert list(out.parent.iterdir()) == []


def test_out_inside_the_source_is_refused(corpus: Path) -> None:
    before = content(corpus)
    for out in (corpus / "data", corpus, corpus / ".." / "corpus" / "data"):
        with pytest.raises((ValueError, FileExistsError)):
            prepare(corpus, out)
    with pytest.raises(ValueError, match="is inside the source folder"):
        prepare(corpus, corpus / "data")
    assert content(corpus) == before


def test_a_folder_called_stdlib_is_not_the_source_stdlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("library/a.py", "library/b.py", "work/stdlib/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "library")}.__getitem__)
    monkeypatch.chdir(tmp_path / "work")
    prepare("stdlib", "stdlib/data")
    assert set.union(*splits(DataFolder.open("stdlib/data"))) == {"library/a.py", "library/b.py"}


def test_missing_parents_are_made(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "a" / "b" / "data")
    DataFolder.open(tmp_path / "a" / "b" / "data")


def test_an_empty_folder_is_as_good_as_none(corpus: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    prepare(corpus, empty)
    assert DataFolder.open(empty).train.tokens.size > 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": "0.1"}, r"validation_fraction must be between 0 and 1, .* got '0.1'"),
        ({"vocab_size": 300.5}, "vocab_size must be an integer, got 300.5"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"tokenizer": 5}, "tokenizer must be a string or a path, got 5"),
        ({"source": None}, "source must be a string or a path, got None"),
    ],
)
def test_arguments_of_wrong_types_are_named(corpus: Path, out: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(**{"source": corpus, "out": out, **arguments})
    assert not out.exists()


def test_an_existing_folder_stays_unless_told(corpus: Path, out: Path) -> None:
    prepare(corpus, out, seed=0)
    before = content(out)
    with pytest.raises(FileExistsError, match="data' exists; choose another folder or overwrite it"):
        prepare(corpus, out, seed=1)
    assert content(out) == before
    prepare(corpus, out, seed=1, overwrite=True)
    assert content(out)["train.bin"] != before["train.bin"]
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_overwriting_may_use_the_old_tokenizer(corpus: Path, out: Path) -> None:
    prepare(corpus, out, tokenizer="bpe", vocab_size=280)
    before = tokenizer_hash(out / "tokenizer")
    prepare(corpus, out, tokenizer=out / "tokenizer", overwrite=True)
    assert tokenizer_hash(out / "tokenizer") == before


def test_overwriting_through_a_link_replaces_what_it_points_to(
    corpus: Path, out: Path, tmp_path: Path
) -> None:
    prepare(corpus, out, seed=0)
    before = content(out)
    (tmp_path / "link").symlink_to(out)
    prepare(corpus, tmp_path / "link", seed=1, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(out)["train.bin"] != before["train.bin"]


@pytest.mark.parametrize(
    "files", [{"thesis.tex": "years"}, {"train.bin": "of someone else"}, {"train.json": "{}"}]
)
def test_a_folder_of_something_else_is_never_overwritten(
    corpus: Path, out: Path, files: dict[str, str]
) -> None:
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    before = content(out)
    with pytest.raises(FileExistsError, match="stays as it is"):
        prepare(corpus, out, overwrite=True)
    assert content(out) == before
    assert list(out.parent.iterdir()) == [out]


def test_data_with_something_added_is_never_overwritten(corpus: Path, out: Path) -> None:
    prepare(corpus, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds more than prepared data \('notes.txt'\)"):
        prepare(corpus, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_is_never_overwritten(corpus: Path, out: Path) -> None:
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="is not a folder"):
        prepare(corpus, out, overwrite=True)
    assert out.read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stage", ["training the tokenizer", "writing tokens"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_preparation_leaves_nothing(
    corpus: Path, out: Path, stage: str, error: type[BaseException], overwrite: bool
) -> None:
    if overwrite:
        prepare(corpus, out)
    before = content(out.parent)

    def interrupt(reached: str, done: int, total: int | None) -> None:
        if reached == stage:
            assert [path.name for path in out.parent.glob(".data.preparing/*")] == ["new"]
            raise error

    with pytest.raises(error):
        prepare(corpus, out, tokenizer="bpe", vocab_size=280, overwrite=overwrite, progress=interrupt)
    assert content(out.parent) == before
    assert [path.name for path in out.parent.iterdir()] == (["data"] if overwrite else [])


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_while_renaming_loses_neither_old_nor_new(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    prepare(corpus, out, seed=0)
    old = content(out)
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, out, seed=1, overwrite=True)
    data = DataFolder.open(out)
    assert data.train.documents + data.validation.documents == len(TEXTS)
    assert (content(out) == old) == (failing == 0)
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def killed_preparation(corpus: Path, out: Path, when: str) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from longshort.data import prepare
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
rename, calls = Path.rename, []
def killed_between(self, target):
    if calls:
        kill()
    calls.append(target)
    return rename(self, target)
if {when!r} == "renaming":
    Path.rename = killed_between
progress = kill if {when!r} == "writing" else None
prepare({str(corpus)!r}, {str(out)!r}, seed=1, overwrite=True, progress=progress)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(longshort.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120)
    assert result.returncode == -signal.SIGKILL


def test_the_leftovers_of_a_killed_preparation_are_harmless_and_cleaned(corpus: Path, out: Path) -> None:
    prepare(corpus, out, seed=0)
    old = content(out)
    killed_preparation(corpus, out, "writing")
    assert content(out) == old
    assert {path.name for path in out.parent.iterdir()} == {"data", ".data.preparing", ".data.lock"}
    prepare(corpus, out, seed=2, overwrite=True)
    assert {path.name for path in out.parent.iterdir()} == {"data"}
    DataFolder.open(out)


def test_killed_between_the_renames_the_next_preparation_brings_the_folder_back(
    corpus: Path, out: Path
) -> None:
    prepare(corpus, out, seed=0)
    killed_preparation(corpus, out, "renaming")
    assert not out.exists()
    with pytest.raises(FileExistsError, match="exists; choose another folder"):
        prepare(corpus, out, seed=2)
    recovered = content(out)
    assert {path.name for path in out.parent.iterdir()} == {"data"}
    prepare(corpus, out, seed=1, overwrite=True)
    assert content(out) == recovered


def test_two_preparations_of_one_folder_do_not_meet(corpus: Path, out: Path) -> None:
    refusals: list[str] = []

    def meddle(*_: object) -> None:
        with pytest.raises(FileExistsError) as caught:
            prepare(corpus, out)
        refusals.append(str(caught.value))
        prepare(corpus, out.with_name("other"))

    prepare(corpus, out, progress=meddle)
    assert len(refusals) == 1
    assert "is being prepared by another process" in refusals[0]
    assert {path.name for path in out.parent.iterdir()} == {"data", "other"}
    DataFolder.open(out)


def test_a_full_disk_leaves_nothing(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(corpus, out)
    assert list(out.parent.iterdir()) == []


def test_a_corpus_larger_than_the_memory_in_use(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "some words " * 1000}) + "\n"
    with open(path, "w") as file:
        file.writelines(line for _ in range(3000))
    (tmp_path / "small.jsonl").write_text(line * 2)
    prepare(tmp_path / "small.jsonl", tmp_path / "small")  # what is imported on the way is not the corpus
    tracemalloc.start()
    prepared = prepare(path, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert prepared.train.bytes + prepared.validation.bytes == 33_000_000
    assert peak < 8_000_000


def test_the_encoder_sees_plain_batches(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    encode = Encoder.encode

    def spy(self: Encoder, texts: list[str]) -> Any:
        batches.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode", spy)
    for i in range(6):
        (corpus / f"large{i}.txt").write_text("x" * 600_000)
    prepare(corpus, out)
    assert len(batches) >= 3
    assert max(batches) < (1 << 20) + 600_000
