import itertools
import json
import re
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from tests.data.conftest import WriteTokens

from longshort.data import DataFolder, TokenFile, TokenFileWriter, byte_tokenizer, tokenizer_hash


@st.composite
def vocabularies_and_documents(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    vocab_size = draw(st.sampled_from([1, 257, 65_536, 65_537, 2**32]))
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20)
    return vocab_size, draw(st.lists(ids, min_size=1, max_size=6))


@given(vocabularies_and_documents(), st.sampled_from([np.int64, np.uint32]))
def test_what_is_written_is_read(case: tuple[int, list[list[int]]], dtype: type[np.integer]) -> None:
    vocab_size, documents = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.part")
        with TokenFileWriter(path, vocab_size, "digest", "a source") as writer:
            for document in documents:
                writer.add(np.array(document, dtype=dtype), text_bytes=len(document) - 1)
        assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))
        assert writer.text_bytes == writer.tokens - writer.documents
        token_file = TokenFile.open(path)
        assert sorted(p.name for p in Path(folder).iterdir()) == ["train.part.bin", "train.part.json"]
        assert token_file.tokens.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)
        assert token_file.documents == len(documents)
        assert len(token_file) == len(token_file.tokens) == sum(map(len, documents))
        offsets = token_file.document_offsets
        assert [token_file.tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)] == documents
        assert token_file.document_bytes.tolist() == [len(document) - 1 for document in documents]
        assert (token_file.vocab_size, token_file.tokenizer_hash) == (vocab_size, "digest")
        assert (token_file.source, token_file.path) == ("a source", path)
        assert offsets.dtype == token_file.document_bytes.dtype == np.int64


def test_tokens_stay_on_disk_and_are_read_only(write_tokens: WriteTokens) -> None:
    path = write_tokens([40_000] * 100, vocab_size=2**22).path
    tracemalloc.start()
    token_file = TokenFile.open(path)
    assert token_file.tokens[-1] == 3_999_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000
    with pytest.raises(ValueError, match="read-only"):
        token_file.tokens[0] = 1


def test_the_bytes_on_disk_are_little_endian(write_tokens: WriteTokens) -> None:
    path = write_tokens([[1, 258]]).path
    assert path.with_suffix(".bin").read_bytes() == b"\x01\x00\x02\x01"


@pytest.mark.parametrize(
    ("ids", "text_bytes", "message"),
    [
        ([], 0, "not empty"),
        ([[1]], 0, "one-dimensional"),
        ([1, 10], 0, "token_ids must be in 0 … 9, got some in 1 … 10"),
        ([-1, 1], 0, "got some in -1 … 1"),
        ([1], -1, "text_bytes must not be negative"),
    ],
)
def test_a_bad_document_is_refused(tmp_path: Path, ids: list[Any], text_bytes: int, message: str) -> None:
    with (
        pytest.raises(ValueError, match=message),
        TokenFileWriter(tmp_path / "x", 10, "hash", "source") as writer,
    ):
        writer.add(np.array(ids, dtype=np.int64), text_bytes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vocab_size", [0, 2**32 + 1])
def test_a_bad_vocabulary_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size must be in 1 … .*got {vocab_size}"):
        TokenFileWriter(tmp_path / "x", vocab_size, "hash", "source")
    assert list(tmp_path.iterdir()) == []


def test_no_document_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no document was written"),
        TokenFileWriter(tmp_path / "x", 10, "", ""),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_the_writer_overwrites_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        TokenFileWriter(tmp_path / "x", 10, "hash", "source")
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_at_the_end_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = TokenFileWriter(tmp_path / "x", 10, "hash", "source")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"), writer:
        writer.add(np.array([1]), 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "does not describe a token file"),
        ({"dtype": "float64"}, "dtype must be uint16 or uint32, is 'float64'"),
        ({"dtype": "object"}, "dtype must be uint16 or uint32"),
        ({"dtype": None}, "dtype must be str, is None"),
        ({"dtype": "uint32"}, "bytes, but tokens0.json states 7 tokens of 4 bytes"),
        ({"length": 8}, "bytes, but tokens0.json states 8 tokens of 2 bytes"),
        ({"length": "7"}, "length must be int, is '7'"),
        ({"length": True}, "length must be int, is True"),
        ({"document_offsets": [0, 3]}, "2 document_bytes need 3 document_offsets, there are 2"),
        ({"document_bytes": [1]}, "1 document_bytes need 2 document_offsets, there are 3"),
        ({"document_offsets": [0, 8, 7]}, "must rise strictly from 0 to the length, 7"),
        ({"document_offsets": [0, 0, 7]}, "must rise strictly"),
        ({"document_offsets": [1, 3, 7]}, "must rise strictly"),
        ({"document_offsets": [0, 3, 6]}, "must rise strictly"),
        ({"document_offsets": [0, 3.5, 7]}, "document_offsets must be a list of integers"),
        ({"document_offsets": [0, [3], 7]}, "document_offsets must be a list of integers"),
        ({"document_offsets": [0, 2**70, 7]}, "document_offsets must be a list of integers"),
        ({"document_offsets": {}}, "document_offsets must be list"),
        (
            {"document_offsets": [], "document_bytes": []},
            "document_offsets must be a list of integers, not empty",
        ),
        ({"document_bytes": [9, -1]}, "document_bytes must not be negative"),
        ({"vocab_size": 0}, "vocab_size 0 does not fit uint16"),
        ({"vocab_size": 65_537}, "vocab_size 65537 does not fit uint16"),
        ({"tokenizer_hash": 5}, "tokenizer_hash must be str, is 5"),
        ({"source": None}, "source must be str, is None"),
    ],
)
def test_a_wrong_description_is_refused(
    write_tokens: WriteTokens, changes: dict[str, Any], message: str
) -> None:
    path = write_tokens([3, 4]).path
    description = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(description | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenFile.open(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x80"])
def test_a_description_that_is_no_json_object_is_refused(write_tokens: WriteTokens, content: str) -> None:
    path = write_tokens([3]).path
    path.with_suffix(".json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path.name}.json (is not JSON|does not describe)"):
        TokenFile.open(path)


def test_a_cut_off_file_is_refused(write_tokens: WriteTokens) -> None:
    path = write_tokens([3, 4]).path
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has 13 bytes, but .* 7 tokens of 2 bytes"):
        TokenFile.open(path)


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_a_missing_half_is_named(write_tokens: WriteTokens, suffix: str) -> None:
    path = write_tokens([3]).path
    path.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name}{suffix} is missing"):
        TokenFile.open(path)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    for split, length in (("train", 9), ("validation", 5)):
        with TokenFileWriter(folder / split, 257, tokenizer_hash(folder / "tokenizer"), "source") as writer:
            writer.add(np.arange(length), length)
    return folder


def test_a_data_folder_opens(data_folder: Path) -> None:
    data = DataFolder.open(str(data_folder))
    assert (len(data.train), len(data.validation)) == (9, 5)
    assert (data.path, data.tokenizer_dir) == (data_folder, data_folder / "tokenizer")


def test_a_missing_data_folder_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no data folder '.*nowhere'.*`longshort data SOURCE --out .*nowhere`"
    ):
        DataFolder.open(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["train.bin", "validation.json", "tokenizer/tokenizer.json"])
def test_an_incomplete_data_folder_names_what_it_lacks(data_folder: Path, part: str) -> None:
    (data_folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {part}; make it with `longshort data SOURCE --out"):
        DataFolder.open(data_folder)


def test_another_tokenizer_is_noticed(data_folder: Path) -> None:
    path = data_folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"train.json was made with another tokenizer"):
        DataFolder.open(data_folder)
