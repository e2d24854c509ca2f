import json

import pytest

from longshort.cli import main

FLAGS = ["--length", "32768", "--global-heads", "1", "2", "--windows", "64", "100", "--memory", "4GiB"]


def planned(capsys, *flags):
    capsys.readouterr()
    assert main(["plan", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def layouts(capsys, *flags):
    return json.loads(planned(capsys, *flags, "--json"))["layouts"]


def test_the_tables_have_a_row_for_each_layout(capsys):
    out = planned(capsys, *FLAGS)
    assert out.startswith(
        "12 layers, 12 heads of 64, hidden size 768: weights of 191 MiB in bfloat16; 32,768"
    )
    for name in (
        "all global (MHSA)",
        "1 global, window 64",
        "2 global, window 100",
        "by layers: 1 of 12, window 1024",
    ):
        assert len([line for line in out.splitlines() if line.startswith(f" {name} ")]) == 2
    (row,) = [
        line for line in out.splitlines() if line.startswith(" 1 global, window 100 ") and "MiB" in line
    ]
    assert row.split()[4:] == ["99.2", "MiB", "8.6%", "276", "MiB", "20.8%", "1,331,692"]
    assert "longest in 4GiB" in out
    assert max(map(len, out.splitlines())) <= 110


def test_json_has_the_numbers(capsys):
    content = json.loads(planned(capsys, *FLAGS, "--json"))
    mhsa, ours = content["layouts"][0], content["layouts"][2]
    assert content["memory"] == 2**32
    assert (mhsa["global_heads"], mhsa["window"]) == (12, None)
    assert (ours["global_heads"], ours["window"]) == (1, 100)
    assert mhsa["cache_bytes"] == 2 * 12 * 12 * 64 * 2 * 32768
    assert ours["cache_bytes"] == 2 * 12 * 64 * 2 * (32768 + 11 * 100)
    assert ours["cache_share"] == ours["cache_bytes"] / mhsa["cache_bytes"]
    assert ours["decode_bytes_share"] == ours["decode_bytes"] / mhsa["decode_bytes"]
    assert ours["prefill_flops"]["matrices"] == mhsa["prefill_flops"]["matrices"]
    for part in ("prefill", "decode"):
        totals = [sum(row[f"{part}_flops"].values()) for row in (ours, mhsa)]
        assert ours[f"{part}_share"] == totals[0] / totals[1] < 0.3


def test_flags_override_the_preset(capsys):
    flags = ["--heads", "8", "--kv-heads", "4", "--head-dim", "16", "--layers", "3", "--vocab-size", "99"]
    content = json.loads(
        planned(
            capsys,
            "--length",
            "50",
            "--preset",
            "tiny",
            *flags,
            "--batch",
            "2",
            "--dtype",
            "float32",
            "--json",
        )
    )
    names = ("layers", "heads", "kv_heads", "head_dim", "hidden_size", "vocab_size", "batch", "memory")
    assert [content[name] for name in names] == [3, 8, 4, 16, 128, 99, 2, None]
    mhsa, ours, _hybrid = content["layouts"]
    assert mhsa["cache_bytes"] == 2 * 2 * 3 * 4 * 16 * 4 * 50
    assert (ours["global_heads"], ours["window"]) == (2, 16)  # the fewest, and the window of the preset
    assert ours["cache_bytes"] == 2 * 2 * 3 * 16 * 4 * (50 + 3 * 16)
    sinks = layouts(capsys, "--length", "50", "--preset", "tiny", *flags, "--sink-tokens", "5")
    assert sinks[1]["cache_bytes"] == 2 * 3 * 16 * 2 * (50 + 3 * 21)


def test_a_file_names_a_shape_whose_layouts_are_not_looked_at(capsys, tmp_path):
    file = tmp_path / "shape.json"
    file.write_text(
        json.dumps({"layouts": [[3, 3, 3, None], [5, 5, None, None]], "position_embedding": "rope"})
    )
    rows = layouts(capsys, "--length", "50", "--preset", str(file), "--hidden-size", "32")
    assert [row["name"] for row in rows] == [
        "all global (MHSA)", "1 global, window 16", "by layers: 1 of 2, window 1024",
    ]  # fmt: skip
    file.write_text(json.dumps({"num_global_heads": [0, 2], "local_window": [5, 3]}))
    rows = layouts(capsys, "--length", "50", "--preset", str(file), "--global-heads", "0", "4")
    assert [row["name"] for row in rows] == ["all global (MHSA)", "0 global, window 3", "0 global, window 5"]


def test_without_global_heads_any_context_fits(capsys):
    out = planned(capsys, "--length", "999", "--global-heads", "0", "--memory", "4GiB")
    (row,) = [line for line in out.splitlines() if line.startswith(" 0 global") and "MiB" in line]
    assert row.split()[-1] == "any"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--length"),
        (["--length", "0"], "--length must be an integer >= 1, got 0"),
        (["--length", "9", "--windows", "64", "0"], "--windows must be an integer >= 1, got 0"),
        (["--length", "9", "--global-heads", "-1"], "--global-heads"),
        (["--length", "9", "--kv-heads", "0"], "--kv-heads"),
        (["--length", "9", "--batch", "0"], "--batch"),
        (["--length", "9", "--hybrid-window", "0"], "--hybrid-window"),
        (["--length", "9", "--sink-tokens", "-1"], "--sink-tokens"),
        (["--length", "9", "--memory", "much"], "--memory must be a size such as 4GiB"),
        (["--length", "9", "--dtype", "int8"], "--dtype"),
    ],
    ids=str,
)
def test_wrong_usage(fails, flags, message):
    assert message in fails(2, "plan", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "huge"], "preset must be one of tiny"),
        (["--kv-heads", "5"], "num_key_value_heads must divide"),
        (["--kv-heads", "3", "--global-heads", "1"], "global_heads must be multiples of the 4 query heads"),
        (["--global-heads", "13"], "at most all 12 heads, got 13"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_failures(fails, flags, message):
    assert message in fails(1, "plan", "--length", "9", *flags)
