"""Files of every format and compression, whole and damaged."""

import bz2
import gzip
import json
import lzma
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from longshort.data import Corpus, Document, Skipped, open_corpus

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress
}  # fmt: skip
COMPRESSED = pytest.mark.parametrize("suffix", COMPRESS)
ONE, TWO = b'{"text": "one"}\n', b'\n{"text": "tw\xc3\xb6"}\n'


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus]


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("in_capitals", [False, True])
@pytest.mark.parametrize("of_content", [".txt", "", ".jsonl", ".ndjson"])
def test_every_compression_of_every_format(
    tmp_path: Path, of_content: str, in_capitals: bool, suffix: str
) -> None:
    name = "corpus" + (of_content + suffix).upper() if in_capitals else f"corpus{of_content}{suffix}"
    content = ONE + TWO
    (tmp_path / name).write_bytes(COMPRESS[suffix](content) if suffix else content)
    corpus = open_corpus(tmp_path / name, strict=True)
    expected = [Document(name, content.decode())]
    if of_content in (".jsonl", ".ndjson"):
        expected = [Document(f"{name}:1", "one"), Document(f"{name}:3", "twö")]
    assert list(corpus) == list(corpus) == expected
    assert corpus.position == corpus.size == (tmp_path / name).stat().st_size
    assert corpus.skipped == Skipped()


@COMPRESSED
@pytest.mark.parametrize("of_content", [".txt", ".jsonl"])
def test_parts_that_were_compressed_one_by_one_are_read_on(
    tmp_path: Path, of_content: str, suffix: str
) -> None:
    compress = COMPRESS[suffix]
    (tmp_path / f"a{of_content}{suffix}").write_bytes(compress(ONE) + compress(b"") + compress(TWO))
    expected = ["one", "twö"] if of_content == ".jsonl" else [(ONE + TWO).decode()]
    assert texts(open_corpus(tmp_path)) == expected


@COMPRESSED
@pytest.mark.parametrize("of_content", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:3],
        lambda _: b"never compressed\n",
        lambda data: data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :],
        lambda data: data + b"and more",
    ],
    ids=["half", "all but a byte", "a beginning", "plain", "overwritten", "appended"],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, of_content: str, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    lines = b"".join(b'{"text": "%x"}\n' % (i**9) for i in range(3000))
    compressed = COMPRESS[suffix](lines)
    if suffix == ".zst":  # by default without a checksum
        compressed = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    path = tmp_path / f"a{of_content}{suffix}"
    path.write_bytes(damage(compressed))
    if damage(b"") == b"and more" and suffix in (".bz2", ".xz"):  # their readers ignore what follows
        assert len(texts(open_corpus(path))) == (3000 if of_content == ".jsonl" else 1)
        return
    is_json_first = of_content == ".jsonl" and len(damage(compressed)) == len(compressed)
    message = f"{path}" if is_json_first else f"{path} is not a whole "
    with pytest.raises(ValueError, match=re.escape(message)):
        texts(open_corpus(path))


def test_a_damaged_file_is_not_taken_for_one_that_is_not_text(tmp_path: Path) -> None:
    """Only the checksum at its end tells that this was text once."""
    stored = bytearray(gzip.compress(b"text " * 20_000, compresslevel=0))
    stored[len(stored) // 2] ^= 0xFF
    path = tmp_path / "a.txt.gz"
    path.write_bytes(stored)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a whole gzip file")):
        texts(open_corpus(path))


def test_zstandard_with_a_long_window_and_skippable_frames(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    whole = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = whole.compress(ONE) + whole.flush()
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + frame + skippable + zstandard.compress(TWO))
    assert texts(open_corpus(tmp_path)) == ["one", "twö"]


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x93NUMPY\1\0 and more", "is binary (NUL bytes), not text; readable: UTF-8 text, .jsonl"),
        (b"ascii for long " * 1000 + b"\0", "is binary (NUL bytes), not text; readable: UTF-8 text, .jsonl"),
        ("grüße".encode("latin-1"), "is not UTF-8 text (it has a byte 0xfc); readable: UTF-8 text, .jsonl"),
        ("cut ö".encode()[:-1], "is not UTF-8 text (it has a byte 0xc3); readable: UTF-8 text, .jsonl"),
    ],
    ids=["binary", "binary at its end", "latin", "cut"],
)
def test_a_file_that_is_not_text_says_what_it_is(
    tmp_path: Path, suffix: str, content: bytes, reason: str
) -> None:
    path = tmp_path / f"x.npz{suffix}"
    path.write_bytes(COMPRESS[suffix](content) if suffix else content)
    (tmp_path / "y.txt").write_text("text")
    corpus = open_corpus(tmp_path)
    assert texts(corpus) == ["text"]
    assert corpus.skipped.not_text == 1
    assert corpus.skipped.examples == [corpus.skipped.first_not_text]
    assert f"{path} {reason}" in str(corpus.skipped.first_not_text)
    with pytest.raises(ValueError, match=re.escape(f"{path} {reason}")):
        texts(open_corpus(tmp_path, strict=True))


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS.get(suffix, bytes)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(b"\xef\xbb\xbf" + ONE))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b"\xef\xbb\xbf\n" + ONE))
    (tmp_path / f"c.jsonl{suffix}").write_bytes(compress(b"\xef\xbb\xbf"))
    (tmp_path / f"d.txt{suffix}").write_bytes(compress(b"\xef\xbb\xbftext"))
    assert texts(open_corpus(tmp_path, strict=True)) == ["one", "one", "text"]


def test_files_without_a_byte_are_empty_whatever_their_name(tmp_path: Path) -> None:
    names = [f"a{of_content}{suffix}" for of_content in (".txt", ".jsonl") for suffix in ("", *COMPRESS)]
    for name in [*names, "a.parquet"]:
        (tmp_path / name).touch()
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "c.txt").write_text("text")
    corpus = open_corpus(tmp_path, strict=True)
    assert texts(corpus) == ["text"]
    assert corpus.skipped == Skipped(empty=len(names) + 2)


def test_all_formats_in_one_folder_and_by_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.md.xz").write_bytes(lzma.compress(b"b"))
    (tmp_path / "c.jsonl").write_bytes(ONE)
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(TWO))
    (tmp_path / "e.zip").write_bytes(b"PK\3\4\0")
    write_parquet(tmp_path / "f.parquet", text=["f", None])
    expected = {"a.txt": "a", "b.md.xz": "b", "c.jsonl:1": "one", "d.jsonl.zst:2": "twö", "f.parquet:0": "f"}
    for source in (tmp_path, tmp_path / "*", tmp_path / "**" / "*.*"):
        corpus = open_corpus(source)
        assert {document.name: document.text for document in corpus} == expected
        assert (corpus.skipped.not_text, corpus.skipped.without_text) == (1, 1)
        assert corpus.position == corpus.size


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_is_one_document_a_row(tmp_path: Path, kind: str) -> None:
    strings = pyarrow.array(["one", "", None, "tw\0o", "drei"] * 50)
    column = strings.dictionary_encode() if kind == "dictionary" else strings.cast(getattr(pyarrow, kind)())
    path = write_parquet(tmp_path / "a.PARQUET", id=range(250), body=column)
    corpus = open_corpus(path, text_field="body")
    expected = [
        Document(f"a.PARQUET:{5 * i + row}", text)
        for i in range(50)
        for row, text in ((0, "one"), (4, "drei"))
    ]
    assert list(corpus) == list(corpus) == expected
    assert corpus.skipped == Skipped(
        empty=50,
        without_text=50,
        not_text=50,
        first_without_text=f"{path}, row 2: field 'body' is null, not a string",
        first_not_text=f"{path}, row 3: field 'body' holds a NUL, which is not text",
    )
    assert corpus.position == corpus.size


def test_parquet_with_a_string_that_is_not_utf8(tmp_path: Path) -> None:
    offsets, content = b"\0\0\0\0\1\0\0\0\3\0\0\0", b"a\xffb"
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(content)]
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    path = write_parquet(tmp_path / "a.parquet", text=broken)
    corpus = open_corpus(path)
    assert texts(corpus) == ["a"]
    assert corpus.skipped.first_not_text == f"{path}, row 1: field 'text' is not UTF-8 text"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "id": [1]}, "has no column 'text' (text_field); its columns: 'body', 'id'"),
        ({"text": [1, 2]}, "column 'text' (text_field) holds int64, not strings"),
        ({"text": [["a"]]}, "column 'text' (text_field) holds list<element: string>, not strings"),
        ({"text": [b"a"]}, "column 'text' (text_field) holds binary, not strings"),
    ],
    ids=["missing", "numbers", "lists", "bytes"],
)
def test_parquet_without_a_column_of_text_is_named(tmp_path: Path, columns: dict, message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        texts(open_corpus(path))


def test_parquet_of_nulls_has_no_text(tmp_path: Path) -> None:
    corpus = open_corpus(write_parquet(tmp_path / "a.parquet", text=[None, None]))
    assert texts(corpus) == []
    assert corpus.skipped.without_text == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda _: b"no parquet at all",
        lambda data: data[:100] + b"\xff" * 2000 + data[2100:],
    ],
    ids=["cut", "plain", "overwritten"],
)
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[f"{i**9:x}" for i in range(2000)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a whole parquet file: ")):
        texts(open_corpus(path))


@pytest.mark.parametrize(("name", "package"), [("a.txt.ZST", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for each in ("0.txt", name):
        (tmp_path / each).write_text("text")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        open_corpus(tmp_path)
    assert str(caught.value) == f"{name} needs {package}: pip install 'longshort[train]'"
    assert caught.value.name == package
    assert texts(open_corpus(tmp_path / "0.txt")) == ["text"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'["text"]', " is an array, not an object with a field 'text'"),
        (b"null", " is null, not an object with a field 'text'"),
        (b'"text"', " is a string, not an object with a field 'text'"),
        (b'{"body": "x", "id": 1}', " has no field 'text' (text_field); its fields: 'body', 'id'"),
        (b"{}", " has no field 'text' (text_field); its fields: none"),
        (b'{"text": 7}', ": field 'text' is a number, not a string"),
        (b'{"text": false}', ": field 'text' is a boolean, not a string"),
        (b'{"text": null}', ": field 'text' is null, not a string"),
        (b'{"text": {"text": "x"}}', ": field 'text' is an object, not a string"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_records_without_text_are_counted_and_the_first_is_named(
    tmp_path: Path, suffix: str, line: bytes, reason: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    content = ONE + line + b"\n" + TWO + line
    path.write_bytes(COMPRESS[suffix](content) if suffix else content)
    corpus = open_corpus(path)
    assert texts(corpus) == texts(corpus) == ["one", "twö"]
    assert corpus.skipped == Skipped(without_text=2, first_without_text=f"{path}, line 2{reason}")
    assert corpus.skipped.examples == [f"{path}, line 2{reason}"]
    strict = iter(open_corpus(path, strict=True))
    assert next(strict).text == "one"
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2{reason}; strict does not leave it out")):
        next(strict)


def test_a_wrong_field_is_told_long_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "x"}\n' * 10_000 + b"this line is never reached\n")
    with pytest.raises(ValueError, match=r"begins with 10,000 records without text: .*, line 1 has no field"):
        texts(open_corpus(path))
    path.write_bytes(ONE + b'{"body": "x"}\n' * 10_000)
    corpus = open_corpus(path)
    assert texts(corpus) == ["one"]
    assert corpus.skipped.without_text == 10_000


def test_rows_of_a_dataset_without_text_are_counted(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": None}, {"text": "two"}, {"text": "\0"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"hf:{tmp_path}"
    corpus = open_corpus(source)
    assert texts(corpus) == ["one", "two"]
    assert corpus.skipped == Skipped(
        without_text=1,
        first_without_text=f"source '{source}', row 1: field 'text' is null, not a string",
        not_text=1,
        first_not_text=f"source '{source}', row 3: field 'text' holds a NUL, which is not text",
    )
    with pytest.raises(ValueError, match="row 1: field 'text' is null"):
        texts(open_corpus(source, strict=True))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_large_compressed_file_is_not_held_in_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"large.jsonl{suffix}"
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    path.write_bytes(COMPRESS[suffix](line * 2000))
    tracemalloc.start()
    count = sum(1 for _ in open_corpus(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 2000
    assert peak < 10_000_000 < 2000 * len(line)


def test_a_large_parquet_file_is_not_held_in_memory(tmp_path: Path) -> None:
    """In a process of its own, since pyarrow's pool counts from the beginning of one."""
    path = tmp_path / "large.parquet"
    texts = [f"{i} " * 200 for i in range(40_000)]
    pyarrow.parquet.write_table(  # one row group
        pyarrow.table({"text": texts, "other": texts}), path, compression="none", use_dictionary=False
    )
    program = """
import sys, tracemalloc
import pyarrow
from longshort.data import open_corpus
tracemalloc.start()
count = sum(1 for _ in open_corpus(sys.argv[1]))
print(count, tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory())
"""
    command = [sys.executable, "-c", program, str(path)]
    count, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == 40_000
    assert int(peak) < 20_000_000 < path.stat().st_size / 3
