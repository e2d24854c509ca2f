"""A preparation that is killed or fails goes on where it stood, and writes what it would have written."""

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import longshort
from longshort.data import formats, interrupted_work, open_corpus, prepare
from longshort.data.encoder import TextEncoder

SETTINGS = sys.modules[prepare.__module__]
COUNT = 120
TEXTS = [f"document {i} größer " + "some words that repeat\n" * (i % 9) for i in range(COUNT)]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(longshort.__file__).parents[1]),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SMALL = "prepare._PORTION_CHARACTERS, prepare._PORTION_DOCUMENTS, prepare._PART_CHARACTERS = 300, 3, 600"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SETTINGS, "_PORTION_CHARACTERS", 300)
    monkeypatch.setattr(SETTINGS, "_PORTION_DOCUMENTS", 3)
    monkeypatch.setattr(SETTINGS, "_PART_CHARACTERS", 600)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts).encode()


def write(folder: Path, kind: str) -> str:
    """Write TEXTS as a corpus of a kind; return the source."""
    folder.mkdir()
    third = COUNT // 3
    for number in range(3):
        texts = TEXTS[number * third : (number + 1) * third]
        if kind in ("jsonl", "hub-jsonl"):
            (folder / f"{number}.jsonl").write_bytes(jsonl(texts))
        elif kind == "gzip":
            (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
        elif kind in ("parquet", "hub-parquet"):
            table = pyarrow.table({"text": texts, "id": [7] * third})
            pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=7)
        else:
            for index, text in enumerate(texts):
                (folder / f"{number * third + index:03}.txt").write_text(text)
    if not kind.startswith("hub"):
        return str(folder)
    configs = "- {config_name: main, data_files: '?.*'}\n- {config_name: other, data_files: 0.*}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return f"hf:{folder}:main"


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail_after(calls: int) -> Callable[..., None]:
    def progress(stage: str, *_: Any) -> None:
        nonlocal calls
        calls -= stage == "writing tokens"
        if calls < 0:
            raise RuntimeError("interrupted")

    return progress


def interrupted(source: str, out: Path, calls: int = 20, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        prepare(source, out, progress=fail_after(calls), **options)
    assert interrupted_work(out) == out.with_name(f".{out.name}.preparing")
    assert not out.exists()
    assert not out.with_name(f".{out.name}.lock").exists()


def counting(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """The texts that are encoded, and an entry for each record that is parsed, from now on."""
    encoded: list[str] = []
    parsed: list[int] = []
    encode, text_of = TextEncoder.encode, formats.text_of

    def spy(self: TextEncoder, texts: list[str]) -> Any:
        encoded.extend(texts)
        return encode(self, texts)

    def note(*arguments: Any) -> Any:
        parsed.append(1)
        return text_of(*arguments)

    monkeypatch.setattr(TextEncoder, "encode", spy)
    monkeypatch.setattr(formats, "text_of", note)
    return encoded, parsed


@pytest.mark.parametrize("kind", ["text", "jsonl", "gzip", "parquet", "hub-jsonl", "hub-parquet"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_it_goes_on_after_the_last_finished_part(
    tmp_path: Path, kind: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "corpus", kind)
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 300, "validation_fraction": 0.3}
    whole = prepare(source, tmp_path / "whole", **options)
    assert whole.train.documents + whole.validation.documents == COUNT
    for calls in (5, 11, 26, 39):  # within each file, and near the end
        out = tmp_path / f"out{calls}"
        interrupted(source, out, calls, **options)
        with monkeypatch.context() as patch:
            encoded, parsed = counting(patch)
            if tokenizer == "bpe":
                patch.setattr(SETTINGS, "train_bpe", None)  # it is not trained again
            prepared = prepare(source, out, **options)
        assert content(out) == content(tmp_path / "whole")
        assert set(encoded) == set(TEXTS[-len(encoded) :])
        assert len(encoded) <= COUNT - 3 * (calls - 3)
        if kind in ("jsonl", "gzip"):
            assert len(parsed) == len(encoded)
        expected = {
            field: value for field, value in vars(whole).items() if field not in ("folder", "resumed_tokens")
        }
        assert expected.items() <= vars(prepared).items()
        assert 0 < prepared.resumed_tokens < whole.train.tokens + whole.validation.tokens
        assert interrupted_work(out) is None
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["text", "hub-parquet"])
def test_any_number_of_processes_writes_the_same(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "corpus", kind)
    options: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 300}
    prepare(source, tmp_path / "1", **options)
    for processes in (2, 5):
        prepare(source, tmp_path / str(processes), processes=processes, **options)
        assert content(tmp_path / str(processes)) == content(tmp_path / "1")
    interrupted(source, tmp_path / "mixed", 9, processes=3, **options)
    interrupted(source, tmp_path / "mixed", 9, processes=2, **options)
    prepare(source, tmp_path / "mixed", **options)
    assert content(tmp_path / "mixed") == content(tmp_path / "1")


def test_a_document_held_back_for_the_other_split_survives(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus", "jsonl")
    prepare(source, tmp_path / "whole", validation_fraction=1e-9)
    interrupted(source, tmp_path / "out", validation_fraction=1e-9)
    assert prepare(source, tmp_path / "out", validation_fraction=1e-9).validation.documents == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_was_left_out_before_is_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(["", "a\0"]) + b'{"text": null}\n' + jsonl(TEXTS) + b'{"text": 3}\n')
    whole = prepare(path, tmp_path / "whole")
    interrupted(str(path), tmp_path / "out")
    assert prepare(path, tmp_path / "out").skipped == whole.skipped
    assert (whole.skipped.empty, whole.skipped.not_text, whole.skipped.without_text) == (1, 1, 2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"validation_fraction": 0.2}, r"validation_fraction was 0.05, is 0.2"),
        (
            {"tokenizer": "bytes"},
            "tokenizer was 'bpe', is 'bytes'; vocab_size was 300, is None; bpe_sample was",
        ),
        ({"vocab_size": 301}, "vocab_size was 300, is 301"),
        ({"bpe_sample": 9}, "bpe_sample was 268435456, is 9"),
        ({"text_field": "id"}, "text_field was 'text', is 'id'"),
        ({"strict": True}, "strict was False, is True"),
        ({"source": "stdlib"}, "source was '.*corpus', is 'stdlib'"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "corpus", "jsonl")
    arguments: dict[str, Any] = {"source": source, "tokenizer": "bpe", "vocab_size": 300}
    interrupted(out=tmp_path / "out", **arguments)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=f"an interrupted preparation has other settings: {message}"):
        prepare(out=tmp_path / "out", **arguments | option)
    assert content(tmp_path) == before
    prepare(out=tmp_path / "out", **arguments)


def test_overwrite_begins_anew_with_other_settings_and_goes_on_with_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus", "jsonl")
    prepare(source, tmp_path / "whole", seed=3)
    interrupted(source, tmp_path / "out")
    assert prepare(source, tmp_path / "out", seed=3, overwrite=True).resumed_tokens == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    old = content(tmp_path / "out")
    with pytest.raises(RuntimeError, match="interrupted"):
        prepare(source, tmp_path / "out", overwrite=True, progress=fail_after(20))
    assert content(tmp_path / "out") == old
    with pytest.raises(FileExistsError, match="exists; choose another folder"):
        prepare(source, tmp_path / "out")
    assert prepare(source, tmp_path / "out", overwrite=True).resumed_tokens > 0
    prepare(source, tmp_path / "other")
    assert content(tmp_path / "out") == content(tmp_path / "other")


@pytest.mark.parametrize("kind", ["jsonl", "hub-jsonl"])
@pytest.mark.parametrize("change", ["edited", "touched", "gone"])
def test_a_source_that_has_changed_is_refused(tmp_path: Path, kind: str, change: str) -> None:
    source = write(tmp_path / "corpus", kind)
    interrupted(source, tmp_path / "out")
    first = tmp_path / "corpus" / "0.jsonl"
    if change == "edited":
        first.write_bytes(first.read_bytes() + jsonl(["more"]))
    elif change == "touched":
        os.utime(first, (1, 1))
    else:
        first.unlink()
    with pytest.raises(
        FileExistsError, match=r"cannot go on, since its source .* has changed: .*--overwrite"
    ):
        prepare(source, tmp_path / "out")
    assert interrupted_work(tmp_path / "out") is not None
    assert prepare(source, tmp_path / "out", overwrite=True).resumed_tokens == 0


def test_a_damaged_file_is_named_and_once_repaired_the_preparation_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus", "jsonl")
    last = tmp_path / "corpus" / "2.jsonl"
    whole = last.read_bytes()
    last.write_bytes(b"{broken\n" + whole)
    with pytest.raises(ValueError, match=r"2.jsonl, line 1 is not JSON"):
        prepare(source, tmp_path / "out")
    last.write_bytes(whole)
    assert prepare(source, tmp_path / "out").resumed_tokens > 0
    prepare(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("file", ["new/train.bin", "train.documents"])
def test_damaged_work_is_not_gone_on_with(tmp_path: Path, file: str) -> None:
    source = write(tmp_path / "corpus", "jsonl")
    interrupted(source, tmp_path / "out")
    os.truncate(tmp_path / ".out.preparing" / file, 10)
    with pytest.raises(ValueError, match=rf"{file.rpartition('/')[2]} has 10 bytes, but \d+ were written"):
        prepare(source, tmp_path / "out")


def test_less_than_a_part_is_not_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus", "jsonl")
    with pytest.raises(RuntimeError):
        prepare(source, tmp_path / "out", progress=fail_after(0))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_the_sample_of_bpe_is_spread_over_the_files(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus", "jsonl")
    corpus = open_corpus(source)
    documents = list(corpus.sample(3000))
    assert documents == list(corpus.sample(3000))
    assert 2700 < sum(len(document.text.encode()) for document in documents) < 3900
    of_file = [document.name.partition(":")[0] for document in documents]
    assert all(of_file.count(f"{number}.jsonl") >= len(documents) // 5 for number in range(3))
    assert list(corpus.sample(corpus.size or 0)) == list(corpus)
    assert corpus.position == corpus.size
    many = open_corpus(write(tmp_path / "texts", "text"))
    numbers = [int(document.name[:3]) for document in many.sample(3000)]
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 30
    assert len(numbers) < 60
    stream = open_corpus(write(tmp_path / "hub", "hub-parquet"))
    assert [document.text for document in stream.sample(3000)] == TEXTS[: len(list(stream.sample(3000)))]


def test_bpe_learns_from_its_sample_alone(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(["aaaa bbbb " * 50] * 20 + ["zzzz qqqq " * 50] * 200))
    prepare(path, tmp_path / "out", tokenizer="bpe", vocab_size=280, bpe_sample=9000)
    vocabulary = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes())["model"][
        "vocab"
    ]
    assert "aaaa" in vocabulary
    assert "zz" not in vocabulary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes must be an integer >= 1, got 0"),
        ({"processes": True}, "processes must be an integer >= 1, got True"),
        ({"processes": 1.5}, "processes must be an integer >= 1, got 1.5"),
        ({"bpe_sample": 0}, "bpe_sample must be an integer >= 1, got 0"),
    ],
)
def test_bad_numbers_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare("stdlib", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import longshort.data
from longshort.data import DataFolder
prepare = sys.modules["longshort.data.prepare"]
{small}
source, out, tokenizer = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
first, step = map(int, sys.argv[4:])

def content(folder):
    return {{str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}}

def run(name, kill_at):
    # In a child that is killed at its event number kill_at; returns whether it was.
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status == signal.SIGKILL
    events = 0
    def hook(event, arguments):
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate") and \\
                f".{{name}}." in str(arguments[0]):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    prepare_here(name)
    os._exit(0)

def prepare_here(name):
    prepare.prepare(source, out / name, tokenizer=tokenizer, vocab_size=270, validation_fraction=0.3)

prepare_here("whole")  # which imports what the children need, too
longshort.data.load_tokenizer(out / "whole" / "tokenizer")
expected = content(out / "whole")
kill_at = first
while run("one", kill_at):
    if kill_at % 3 == 0:
        run("one", 5 + kill_at % 17)  # once more
    if (out / "one").exists() and not (out / ".one.preparing" / "progress.json").exists():
        break  # all was done but the removal of the last traces
    assert not run("one", 0), kill_at
    assert content(out / "one") == expected, kill_at
    assert sorted(p.name for p in out.iterdir() if p.name != "corpus") == ["one", "whole"], kill_at
    DataFolder.open(out / "one")
    shutil.rmtree(out / "one")
    kill_at += step
assert content(out / "one") == expected
print(kill_at)
"""


def killed_at_events(tmp_path: Path, kind: str, tokenizer: str, first: int, step: int) -> int:
    source = write(tmp_path / "corpus", kind)
    script = KILLER.format(small=SMALL)
    command = [sys.executable, "-c", script, source, str(tmp_path), tokenizer, str(first), str(step)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize(("kind", "tokenizer", "step"), [("jsonl", "bytes", 7), ("hub-parquet", "bpe", 19)])
def test_killed_at_events_of_the_file_system(tmp_path: Path, kind: str, tokenizer: str, step: int) -> None:
    assert killed_at_events(tmp_path, kind, tokenizer, 1, step) > 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "jsonl", "gzip", "parquet", "hub-jsonl", "hub-parquet"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_killed_at_every_event_of_the_file_system(tmp_path: Path, kind: str, tokenizer: str) -> None:
    assert killed_at_events(tmp_path, kind, tokenizer, 1, 1) > 60


@pytest.mark.slow
def test_killed_at_random_moments_with_processes(tmp_path: Path) -> None:
    source = write(tmp_path / "corpus", "hub-jsonl")
    options: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 270}
    prepare(source, tmp_path / "whole", **options)
    script = f"""
import sys, time
import longshort.data
prepare = sys.modules["longshort.data.prepare"]
{SMALL}
print("ready", flush=True)
wait = lambda *_: time.sleep(0.02)
prepare.prepare({source!r}, {str(tmp_path / "out")!r}, processes=2, progress=wait, **{options!r})
"""
    draw = random.Random(0)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0.1, 2.0))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait(60) == 0 or (tmp_path / "out").exists():
            break
        kills += 1
    assert kills >= 1
    if not (tmp_path / "out").exists():
        prepare(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
