import pytest

from longshort.cli.units import format_bytes, format_count, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("80GB", 80 * 10**9),
        ("7", 7),
        (" 12 B ", 12),
        ("1e9", 10**9),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes("--memory", text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "0.1B", "4 gigs", "4Gib", "nan", "inf", "1e999", "4GiB x"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"--memory must be a size such as 4GiB, in one of B, .*, got "):
        parse_bytes("--memory", text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1536, "1.5 KiB"),
        (2**40 * 5, "5 TiB"),
        (2**52, "4,096 TiB"),
        (round(999.7 * 2**20), "0.976 GiB"),
        (round(999.4 * 2**20), "999 MiB"),
    ],
)
def test_bytes_are_written(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12"), (1000, "1 k"), (999_700, "1 M"), (5_566_277_615_616, "5.57 T"), (10**18, "1,000 P")],
)
def test_counts_are_written(count, text):
    assert format_count(count) == text
