"""Bias and noise that rounding inside attention adds to the gradients of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from longshort.data import DataFolder
from longshort.reporting.intervals import Interval, confidence_interval
from longshort.reporting.page import Section, Table
from longshort.stability.rounding import AUDITED
from longshort.studies.framework.study import Trial, Workplace
from longshort.studies.language.trial import data_folder, trained_run
from longshort.training.audit import audit_trained
from longshort.training.trained import open_trained

_NUMBERS = ("bias", "bias_error", "noise", "mean_error")


def run_audit(trial: Trial, workplace: Workplace) -> dict[str, Any]:
    """Audit the last weights of a training, which is trained, or resumed, if it is not finished.

    Returns:
        "step", of the weights; "left_out", precisions with the reason why they were not measured; and
        "errors", as `audit_trained` gives them, to four digits.

    Raises:
        InterruptedError: the training was stopped by a signal, after it wrote a checkpoint.
    """
    with trained_run(trial.settings, workplace) as run:
        found = audit_trained(
            open_trained(run, workplace.torch_device),
            DataFolder.open(data_folder(workplace)),
            batches=trial.settings["audit"]["batches"],
            progress=lambda done, total: workplace.report_progress(done / total),
        )
    errors = [
        {**error, **{name: float(f"{error[name]:.4g}") for name in _NUMBERS}} for error in found["errors"]
    ]
    return {"step": found["step"], "left_out": found["left_out"], "errors": errors}


Audits = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of `run_audit`, one per seed, by the name of their arm."""


def error_over_seeds(
    audits: Sequence[Mapping[str, Any]], precision: str, matrix: str, number: str
) -> Interval | None:
    """Compute the interval over seeds of a number's mean over layers; None where it was not measured."""
    values: list[float | None] = []
    for audit in audits:
        layers = [
            error[number] for error in audit["errors"]
            if (error["precision"], error["matrix"]) == (precision, matrix)
        ]  # fmt: skip
        if not layers:
            return None
        values.append(None if None in layers else fmean(layers))
    return confidence_interval(values)


def precision_sections(audits: Audits) -> list[Section]:
    """Report bias, noise and the common part of the error by arm, matrix and precision."""
    if not audits:
        return []
    biases = {
        f"{name}, {matrix.upper()}, {precision}": bias
        for name, of_arm in audits.items()
        for matrix in ("q", "k")
        for precision in AUDITED
        if (bias := error_over_seeds(of_arm, precision, matrix, "bias")) is not None and bias.is_known
    }
    biased = [f"{where}: {_text(bias)}" for where, bias in biases.items() if bias.low > 0 or bias.high < 0]
    intro = (
        "On the last weights of each training, gradients of the weights of queries (Q) and keys (K) with all "
        "attention in one precision are compared with those of attention in fp64 on the same batches. Bias "
        "is the mean of <error, gradient> / |gradient|²: above 0 the gradient is too long. Mean over layers; "
        "95 % intervals over seeds."
    )
    which = f" They are {'; '.join(biased)}." if biased else ""
    verdict = (
        f"{len(biased)} of {len(biases)} intervals of the bias exclude 0; 1 in 20 would by chance.{which}"
    )
    noise = "Deviation of the errors from their mean over batches, relative to the mean gradient."
    common = (
        "Size of the mean error in standard errors: about 1 if the errors of batches only differ, above if "
        "they have a part in common that does not average out."
    )
    return [
        Section(
            "Rounding: signed bias", [intro, verdict] if biases else [intro], table=_table(audits, "bias")
        ),
        Section("Rounding: noise", [noise], table=_table(audits, "noise")),
        Section("Rounding: common part", [common], table=_table(audits, "mean_error")),
    ]


def _table(audits: Audits, number: str) -> Table:
    rows = [
        (f"{name}, {matrix.upper()}", *(
            _text(error_over_seeds(of_arm, precision, matrix, number)) for precision in AUDITED
        ))
        for name, of_arm in audits.items()
        for matrix in ("q", "k")
    ]  # fmt: skip
    return Table(("", *AUDITED), rows)


def _text(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    if interval.mean != interval.mean:
        return "not finite"
    if not interval.is_known:
        return f"{interval.mean:.2g}"
    return f"{interval.mean:.2g} [{interval.low:.2g}, {interval.high:.2g}]"
