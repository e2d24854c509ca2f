import weakref
from functools import cached_property

import pandas as pd
import pytest
import torch
from tests.bench.toy import ToyBenchmark, metrics

from longshort.bench.benchmark import UnsuitableError
from longshort.bench.plot import plot_rows
from longshort.bench.record import ROUND_KEYS, in_same_round, read_rows, summarize
from longshort.bench.sweep import Remark, groups_in_memory, measure

NEED = {"gpt2": 3, "ls": 2, "hybrid": 2, "mhsa": 4, "mistral": 1}
HERE = "64 tokens, a setting"


def need(names):
    return sum(NEED[name] for name in names)


@pytest.mark.parametrize(
    ("together", "alone", "groups"),
    [
        (12, 12, [["gpt2", "ls", "hybrid", "mhsa", "mistral"]]),
        (11, 12, [["ls", "mhsa", "gpt2", "hybrid"], ["mistral"]]),
        (5, 6, [["ls", "mhsa"], ["gpt2", "hybrid"], ["mistral"]]),
        (5, 5, [["gpt2", "ls"], ["hybrid"], ["mhsa", "mistral"]]),
        (3, 3, [["gpt2"], ["ls"], ["hybrid", "mistral"]]),
        (0, 0, []),
    ],
    ids=str,
)
def test_who_is_in_memory_at_once(together, alone, groups):
    left_out: list[str] = []
    pair = ("ls", "mhsa")
    found = groups_in_memory(NEED, need, together, alone, pair, lambda name, _: left_out.append(name))
    assert found == groups
    assert left_out == [name for name in NEED if NEED[name] > alone]


def test_what_does_not_fit_is_reported():
    left_out: list[tuple[str, str]] = []
    groups = groups_in_memory(
        NEED,
        lambda names: 2**30 * need(names),
        2**31,
        2**31,
        ("ls", "mhsa"),
        lambda *why: left_out.append(why),
    )
    assert {name for group in groups for name in group} == {"ls", "hybrid", "mistral"}
    assert left_out == [
        (name, f"takes about {NEED[name]} GiB, 2 are allowed; see --max-memory-gib")
        for name in ("gpt2", "mhsa")
    ]


class Scripted(ToyBenchmark):
    """Records who takes a turn; `third` fails in its second round."""

    @cached_property
    def turns(self) -> list[str]:
        return []

    @cached_property
    def kept(self) -> list[weakref.ref]:
        return []

    def turn(self, case, provider, inputs, note):
        heavy = torch.ones(3)
        self.kept.append(weakref.ref(heavy))

        def take_turn():
            if provider == "third" and len(self.turns) > 4:
                raise RuntimeError("no memory left\nat all")
            self.turns.append(provider)
            return {"milliseconds": float(heavy.sum()) * len(self.turns)}

        return take_turn

    def each_round(self, case):
        self.turns.append("peak")
        return {"fma_peak": 1.0}


def test_providers_take_turns_after_a_round_that_warms_up():
    benchmark = Scripted(providers=("first", "second", "first"))
    results = measure(benchmark)
    assert benchmark.turns == ["first", "second", "peak"] * 3
    assert results.rounds["milliseconds"].tolist() == [12, 15, 21, 24]
    assert results.rounds["fma_peak"].tolist() == [1] * 4
    assert metrics(results)[64, "second"] == {
        "milliseconds": 19.5, "fma_peak": 1, "speedup": pytest.approx((12 / 15 + 21 / 24) / 2, rel=1e-4)
    }  # fmt: skip
    assert set(results.rows["rounds"]) == {2}


def test_a_provider_that_fails_is_left_out():
    benchmark = Scripted(providers=("first", "second", "third"))
    gone = []
    results = measure(benchmark, report_progress=lambda _: gone.append(benchmark.kept[2]() is None))
    assert benchmark.turns == [
        "first", "second", "third", "peak", "first", "second", "peak", "first", "second", "peak",
    ]  # fmt: skip
    assert gone == [False, True, True]  # with what it keeps
    assert set(results.rows["provider"]) == {"first", "second"}
    assert results.left_out == [Remark("third", HERE, "failed: RuntimeError: no memory left")]


class Failing(ToyBenchmark):
    error: Exception = RuntimeError("no memory left")
    where = "turn"

    def inputs(self, case, group):
        if self.where == "inputs":
            raise self.error

    def turn(self, case, provider, inputs, note):
        if provider == "second":
            raise self.error
        return super().turn(case, provider, inputs, note)


def test_a_provider_that_fails_before_its_turn_is_left_out():
    results = measure(Failing())
    assert set(results.rows["provider"]) == {"first"}
    assert results.left_out == [Remark("second", HERE, "failed: RuntimeError: no memory left")]


def test_inputs_that_fail_leave_out_every_provider(monkeypatch):
    monkeypatch.setattr(Failing, "where", "inputs")
    with pytest.raises(ValueError, match=r"nothing was measured: failed: RuntimeError: no memory left$"):
        measure(Failing())


def test_only_failures_of_the_run_become_remarks(monkeypatch):
    monkeypatch.setattr(Failing, "error", UnsuitableError("cannot see"))
    assert measure(Failing()).left_out == [Remark("second", HERE, "cannot see")]
    monkeypatch.setattr(Failing, "error", ValueError("else"))
    with pytest.raises(ValueError, match=r"^else$"):
        measure(Failing())


class Grouped(ToyBenchmark):
    alive: tuple[bool, ...] = ()
    before = None

    def groups(self, case, leave_out):
        leave_out("third", "too large")
        return [["second"], ["first"]]

    def turn(self, case, provider, inputs, note):
        cls, weights = type(self), torch.ones(3)
        if cls.before is not None:
            cls.alive += (cls.before() is not None,)
        cls.before = weakref.ref(weights)
        return lambda: {"milliseconds": float(weights[0])}


def test_one_group_is_gone_when_the_next_is_built():
    results = measure(Grouped())
    assert Grouped.alive == (False,)
    assert [name for _, name in metrics(results)] == ["second", "first"]
    assert "speedup" not in metrics(results)[64, "second"]  # measured in other rounds
    assert results.left_out == [Remark("third", HERE, "too large")]


def test_ratios_are_paired_by_round():
    index = pd.MultiIndex.from_product([[0], [1, 2, 3], ["first", "second"]], names=ROUND_KEYS)
    rounds = pd.DataFrame({"milliseconds": [2.0, 1.0, 9.0, 3.0, 3.0, 3.0]}, index)
    ratio = in_same_round(rounds, "milliseconds", "first") / rounds["milliseconds"]
    assert ratio.xs("second", level="provider").tolist() == [2, 3, 1]
    assert in_same_round(rounds, "milliseconds", "third").isna().all()


def test_rows_hold_percentiles_of_all_samples_and_nothing_that_is_no_number():
    index = pd.MultiIndex.from_product([[0], [0, 1], ["first"]], names=ROUND_KEYS)
    rounds = pd.DataFrame(
        {
            "milliseconds": [[10.0, 30.0], [20.0, 40.0]], "bytes_read": [123_456_789, 123_456_789],
            "speedup": [float("nan"), float("inf")], "helper": [1, 1],
        },
        index,
    )  # fmt: skip
    rows = summarize(rounds, {"x": 5}, {"window": None})
    assert rows.to_dict("records") == [
        {"x": 5, "provider": "first", "metric": "milliseconds", "unit": "ms", "p10": pytest.approx(13),
         "p50": 25, "p90": pytest.approx(37), "rounds": 2, "window": None},
        {"x": 5, "provider": "first", "metric": "bytes_read", "unit": "B", "p10": 123_456_789,
         "p50": 123_456_789, "p90": 123_456_789, "rounds": 2, "window": None},
    ]  # fmt: skip


def test_progress_grows_to_the_end():
    shares: list[float] = []
    measure(ToyBenchmark(lengths=(32, 64)), report_progress=shares.append)
    assert shares == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])


def test_files(tmp_path):
    out = tmp_path / "toy.csv"
    threads, shown = torch.get_num_threads(), []
    results = measure(ToyBenchmark(lengths=(32, 64), threads=2, out=out), shown.append)
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.csv", "toy.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    read = read_rows(out)
    assert list(read) == list(results.rows) == [
        "benchmark", "setting", "x", "provider", "metric", "unit", "p10", "p50", "p90", "rounds", "threads",
        "window", "torch_version", "transformers_version", "capability", "processor", "accelerator",
    ]  # fmt: skip
    for column in ("x", "provider", "metric", "p50"):
        assert read[column].tolist() == results.rows[column].tolist()
    assert shown[0].startswith(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, ")
    assert shown[1:5] == [
        "\n32 tokens, a setting",
        "  provider        ms   speedup",
        "  first         1.00      1.00",
        "  second        2.00      0.50",
    ]
    assert shown[-1] == f"\nnumbers: {out}\nplot:    {out.with_suffix('.png')}"


def test_a_file_of_something_else_is_refused(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("x,provider,metric,unit,p10,p50\n")
    with pytest.raises(ValueError, match=r"other\.csv lacks the columns benchmark, setting, p90, rounds"):
        read_rows(other)


def test_what_was_left_out_and_what_is_noted_is_shown():
    class Noted(ToyBenchmark):
        def turn(self, case, provider, inputs, note):
            note("its mask was made beforehand")
            if provider == "second":
                raise UnsuitableError(f"cannot see {'far' if case.x > 32 else 'near'}")
            return super().turn(case, provider, inputs, note)

    shown: list[str] = []
    measure(Noted(lengths=(32, 64)), shown.append)
    assert shown[-6:] == [
        "\nnotes:",
        "  first: its mask was made beforehand (2 settings)",
        "  second: its mask was made beforehand (2 settings)",
        "\nnot measured:",
        "  second: cannot see near (32 tokens, a setting)",
        "  second: cannot see far (64 tokens, a setting)",
    ]


def test_an_interrupted_sweep_keeps_its_rows(tmp_path):
    out = tmp_path / "toy.csv"
    out.write_text("older")

    def show(text):
        if text.startswith("\n64 tokens"):
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        measure(ToyBenchmark(lengths=(32, 64), threads=2, out=out, overwrite=True), show=show)
    assert torch.get_num_threads() == threads
    assert out.read_text() == "older"
    assert set(read_rows(tmp_path / "toy.csv.partial")["x"]) == {32}
    out.unlink()
    with pytest.raises(FileExistsError, match=r"toy\.csv\.partial exists; --overwrite"):
        measure(ToyBenchmark(out=out))


def test_nothing_measured_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing was measured: failed: RuntimeError"):
        measure(Failing(providers=("second",), out=tmp_path / "toy.csv"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["toy.csv", "toy.png"])
def test_files_are_not_overwritten_unasked(tmp_path, name):
    old = tmp_path / name
    old.write_text("precious")
    out = tmp_path / "toy.csv"
    with pytest.raises(FileExistsError, match=f"{name} exists; --overwrite replaces it"):
        measure(ToyBenchmark(out=out))
    assert old.read_text() == "precious"
    measure(ToyBenchmark(out=out, overwrite=True))
    assert old.read_bytes() != b"precious"


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "toy.png").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        measure(ToyBenchmark(out=tmp_path / "toy.csv", overwrite=True))


def test_a_folder_that_takes_no_files_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("longshort.bench.sweep.os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="--out: nothing may be written to the folder"):
        measure(Failing(out=tmp_path / "toy.csv"))


def test_a_plot_needs_rows(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        plot_rows(pd.DataFrame(), ToyBenchmark(), tmp_path / "toy.png")


@pytest.mark.parametrize("bound", [None, ("the least", "second", "speedup")])
def test_a_plot_has_a_panel_for_each_setting(tmp_path, bound, monkeypatch):
    figures = []
    monkeypatch.setattr("longshort.bench.plot.save_figure", lambda figure, _file: figures.append(figure))
    monkeypatch.setattr(ToyBenchmark, "bound", bound)
    rows = measure(ToyBenchmark(lengths=(64, 32))).rows
    rows = pd.concat([rows, rows.assign(setting="b"), rows.assign(setting="c", p50=0.0)])
    plot_rows(rows, ToyBenchmark(), tmp_path / "toy.png")
    (figure,) = figures
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in visible] == ["a setting", "b", "c"]
    assert len(figure.axes) == 4
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == sorted(["first", "second", *(["the least"] if bound else [])])
    assert [tick.get_text() for tick in visible[0].get_xticklabels()] == ["32", "64"]


@pytest.mark.parametrize("none", [(), []], ids=["tuple", "list"])
def test_an_empty_list_is_refused(none):
    with pytest.raises(ValueError, match="--lengths must name at least one, got none"):
        ToyBenchmark(lengths=none)
