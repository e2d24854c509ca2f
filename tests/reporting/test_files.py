import math
import os
import stat

import pytest

from longshort.reporting import files


def test_a_file_is_written_with_its_folder(tmp_path):
    files.replace_file(tmp_path / "a" / "b" / "file.txt", b"content")
    assert (tmp_path / "a" / "b" / "file.txt").read_bytes() == b"content"


def test_a_file_is_replaced_and_readable_for_others(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    mask = os.umask(0o022)
    try:
        files.replace_file(path, b"new")
    finally:
        os.umask(mask)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_what_is_not_finite():
    content = {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": math.inf, "e": "text"}}
    assert files.strict_json(content).split() == (
        [
            "{",
            '"a":',
            "null,",
            '"b":',
            "[",
            "1.5,",
            "null",
            "],",
            '"c":',
            "{",
            '"d":',
            "null,",
            '"e":',
            '"text"',
            "}",
            "}",
        ]
    )
