import gzip
import json
import re
import sysconfig
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from datasets import load_dataset_builder

from longshort.data import Document, Skipped, open_corpus


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(source: object, text_field: str = "text") -> dict[str, str]:
    return {document.name: document.text for document in open_corpus(str(source), text_field)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (root / ".notes").write_text("hidden")
    (root / "b" / "two.txt").write_bytes(b"two\r\nlines\n")
    (root / "b" / "empty.txt").write_text("")
    (root / "a.md").write_bytes("\ufeffgrüße".encode())
    (root / "latin.txt").write_bytes("grüße".encode("latin-1"))
    (root / "weights.bin").write_bytes(b"ascii\0but binary")
    return root


def test_folder_yields_text_files_in_order_and_counts_what_it_leaves_out(folder: Path) -> None:
    corpus = open_corpus(folder)
    documents = list(corpus)
    assert documents == [Document("a.md", "grüße"), Document("b/two.txt", "two\r\nlines\n")]
    assert corpus.skipped.examples == [corpus.skipped.first_not_text]
    assert f"{folder / 'latin.txt'} is not UTF-8 text" in corpus.skipped.examples[0]
    assert replace(corpus.skipped, first_not_text=None) == Skipped(hidden=2, not_text=2, empty=1)
    assert str(corpus.skipped) == "2 hidden, 2 not UTF-8 text, 0 without text, 1 empty"
    visible = ("a.md", "b/two.txt", "latin.txt", "weights.bin")
    assert corpus.size == corpus.position == sum((folder / name).stat().st_size for name in visible)


def test_a_second_pass_yields_the_same_and_counts_anew(folder: Path) -> None:
    corpus = open_corpus(folder)
    first = list(corpus)
    skipped = corpus.skipped
    assert list(corpus) == first
    assert corpus.skipped == skipped


def test_links_to_files_are_followed_and_broken_ones_ignored(folder: Path) -> None:
    (folder / "link.txt").symlink_to(folder / "a.md")
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    assert set(texts(folder)) == {"a.md", "b/two.txt", "link.txt"}


def test_a_long_file_is_read_whole(tmp_path: Path) -> None:
    text = "äöü\n" * 700_000
    (tmp_path / "long.txt").write_text(text)
    assert texts(tmp_path) == {"long.txt": text}


def test_glob_names_do_not_hold_the_folders_before_the_pattern(folder: Path) -> None:
    assert set(texts(folder / "**" / "*.txt")) == {"b/two.txt"}
    assert set(texts(folder / "[ab]*")) == {"a.md"}


def test_glob_relative_to_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert set(texts("*.md")) == {"a.md"}
    assert set(texts("b/*")) == {"two.txt"}


def test_an_existing_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "data[1]").mkdir()
    (tmp_path / "data[1]" / "x.txt").write_text("x")
    assert texts(tmp_path / "data[1]") == {"x.txt": "x"}


def test_stdlib_is_this_pythons_library_without_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(sysconfig.get_path("stdlib"), "glob.py").read_text() in (
        d.text for d in open_corpus("stdlib")
    )
    for name in (
        "glob.py",
        "json/decoder.py",
        "site-packages/numpy.py",
        "json/data.txt",
        "dist-packages/x.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    assert [document.name for document in open_corpus("stdlib")] == ["glob.py", "json/decoder.py"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_is_one_document_a_line(tmp_path: Path, suffix: str) -> None:
    lines = b'{"text": "one", "id": 1}\n\n{"text": ""}\n{"text": "two\\nlines \\u00e9"}\n{"text": "\\ud800"}'
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    corpus = open_corpus(path)
    documents = list(corpus)
    assert documents == [Document(f"{path.name}:1", "one"), Document(f"{path.name}:4", "two\nlines é")]
    half = f"{path}, line 5: field 'text' holds half a surrogate pair, which is not text"
    assert corpus.skipped == Skipped(empty=1, not_text=1, first_not_text=half)
    assert corpus.position == corpus.size == path.stat().st_size


def test_jsonl_shards_by_folder_and_by_glob(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"body": name}])
    expected = {"a.jsonl:1": "a", "b.jsonl:1": "b"}
    assert texts(tmp_path, text_field="body") == expected
    assert texts(tmp_path / "*.jsonl", text_field="body") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}", "line 2 is not JSON"),
        (b'{"text": "\xff"}', "line 2 is not JSON"),
    ],
)
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        list(open_corpus(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no file or folder 'nowhere'"),
        ("", "there is no file or folder ''"),
        ("*.nothing", "no file matches '*.nothing'"),
        ("nowhere/*.txt", "no file matches 'nowhere/*.txt'"),
        ("empty", "folder 'empty' holds no file (1 hidden ones left out)"),
    ],
)
def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        open_corpus(source)


def test_a_text_field_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_field must be the name of a field, got ''"):
        open_corpus(tmp_path, text_field="")


def test_hugging_face_dataset_of_jsonl(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"title": "x", "text": f"document {i}"} for i in range(50)])
    corpus = open_corpus(f"hf:{tmp_path}")
    expected = [Document(f"train:{i}", f"document {i}") for i in range(50)]
    assert list(corpus) == expected
    assert list(corpus) == expected
    assert corpus.size is None
    assert corpus.position == sum(len(document.text) for document in expected)


def test_hugging_face_dataset_of_parquet_with_a_configuration(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for config in ("small", "large"):
        (tmp_path / config).mkdir()
        table = pyarrow.table({"book": [f"{config} one", "", f"{config} two"]})
        pyarrow.parquet.write_table(table, tmp_path / config / "train.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: small, data_files: small/train.parquet}\n"
        "- {config_name: large, data_files: large/train.parquet}\n---\n"
    )
    corpus = open_corpus(f"hf:{tmp_path}:large", text_field="book")
    assert list(corpus) == [Document("train:0", "large one"), Document("train:2", "large two")]
    assert corpus.skipped == Skipped(empty=1)


def test_fields_known_only_from_rows_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.IterableDataset, "column_names", None)  # as it is for CSV
    path = write_jsonl(tmp_path / "a.jsonl", [{"title": "x", "text": "y"}])
    with pytest.raises(ValueError, match=r"no field 'body' \(text_field\); its fields: 'title', 'text'"):
        open_corpus(f"hf:{tmp_path}", text_field="body")
    assert texts(f"hf:{tmp_path}") == {"train:0": "y"}
    path.write_text("{")
    with pytest.raises(ValueError, match="the dataset cannot be read"):
        open_corpus(f"hf:{tmp_path}")


def test_hugging_face_errors_name_the_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"title": "x", "text": "y"}])
    with pytest.raises(ValueError, match=r"no field 'body' \(text_field\); its fields: 'title', 'text'"):
        open_corpus(f"hf:{tmp_path}", text_field="body")
    with pytest.raises(ValueError, match="nowhere': the dataset cannot be opened"):
        open_corpus(f"hf:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match=r"other': the dataset cannot be opened.*default"):
        open_corpus(f"hf:{tmp_path}:other")
    with pytest.raises(ValueError, match="names no dataset"):
        open_corpus("hf:")
    (tmp_path / "a.jsonl").rename(tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match=r"the dataset cannot be opened: .*split.*train"):
        open_corpus(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "config"), [("owner/name", None), ("owner/na.me:some-config", "some-config")]
)
def test_a_name_of_the_hub_needs_no_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, config: str | None
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []

    def load(name: str, config: str | None, revision: str | None) -> object:
        asked.append((name, config, revision))
        return load_dataset_builder("json", data_files="a.jsonl")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    assert texts(source) == {"train:0": "x"}
    assert asked == [(source.partition(":")[0], config, None)]
    (tmp_path / "owner").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no file or folder {source!r}")):
        open_corpus(source)


def test_a_dataset_of_the_hub_is_read_on_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(9)])
    revisions: list[str | None] = []

    def load(name: str, config: str | None, revision: str | None = None) -> object:
        revisions.append(revision)
        local = load_dataset_builder("json", data_files=str(path))
        at = f"hf://datasets/owner/name@{revision or now}/a.jsonl"
        fake = SimpleNamespace(config=SimpleNamespace(data_files={"train": [at]}))
        fake.as_streaming_dataset = local.as_streaming_dataset
        return fake

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    now = "a" * 40
    corpus = open_corpus("owner/name")
    documents = iter(corpus)
    first = [next(documents).text for _ in range(4)]
    state = json.loads(json.dumps(corpus.state))
    now = "b" * 40
    later = open_corpus("hf:owner/name")
    assert later.changed_since(state) is None
    assert revisions == [None, None, "a" * 40]
    assert first + [document.text for document in later.read(state)] == [f"{i}" for i in range(9)]
    assert open_corpus("hf:owner/name", "text").changed_since(
        state | {"reader": state["reader"] | {"digest": ""}}
    )


def test_a_hugging_face_dataset_that_breaks_midway_names_the_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}])
    (tmp_path / "b.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=re.escape(f"source 'hf:{tmp_path}'")):
        list(open_corpus(f"hf:{tmp_path}"))


def test_a_large_jsonl_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "word " * 2000}) + "\n"
    with open(path, "w") as file:
        file.writelines(line for _ in range(2000))
    corpus = open_corpus(path)
    tracemalloc.start()
    count = sum(1 for _ in corpus)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 2000
    assert path.stat().st_size > 20_000_000
    assert peak < 1_000_000


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson"])
def test_jsonl_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n{"text": "\\u0000"}\n')
    corpus = open_corpus(tmp_path / name)
    assert [document.text for document in corpus] == ["one", "two"]
    assert corpus.skipped.not_text == 1


def test_json_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 is not JSON"):
        list(open_corpus(tmp_path / "a.jsonl"))
