"""Settings: what is refused, and how the message names it."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from longshort.checks import flag
from longshort.layers import ATTENTION_PRECISIONS
from longshort.model import LongShortConfig
from longshort.training.config import MODEL_SETTINGS, AttentionPrecision, TrainConfig


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"preset": "tiny", "data": "data", "out": "run", **changes})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", -3, "--steps must be an integer >= 1, got -3"),
        ("steps", 2.0, "--steps must be an integer >= 1, got 2.0"),
        ("steps", True, "--steps must be an integer >= 1, got True"),
        ("steps", None, "--steps must be an integer >= 1, got None"),
        ("batch_size", 0, "--batch-size must be an integer >= 1, got 0"),
        ("micro_batch_size", 0, "--micro-batch-size must be an integer >= 1, got 0"),
        ("window", 0, "--window must be an integer >= 1, got 0"),
        ("global_heads", -1, "--global-heads must be an integer >= 0, got -1"),
        ("sink_tokens", -1, "--sink-tokens must be an integer >= 0, got -1"),
        ("sequence_length", 0, "--sequence-length must be an integer >= 1, got 0"),
        ("log_every", 0, "--log-every must be an integer >= 1, got 0"),
        ("monitor_every", -1, "--monitor-every must be an integer >= 0, got -1"),
        ("evaluate_every", -1, "--evaluate-every must be an integer >= 0, got -1"),
        ("checkpoint_every", 0, "--checkpoint-every must be an integer >= 1, got 0"),
        ("keep_checkpoints", 0, "--keep-checkpoints must be an integer >= 1, got 0"),
        ("seed", -1, "--seed must be an integer >= 0 and < 2**63, got -1"),
        ("threads", 0, "--threads must be an integer >= 1, got 0"),
        ("learning_rate", 0, "--learning-rate must be a number > 0, got 0"),
        ("learning_rate", float("nan"), "--learning-rate must be a number > 0, got nan"),
        ("learning_rate", "fast", "--learning-rate must be a number > 0, got 'fast'"),
        ("min_learning_rate", -1e-4, "--min-learning-rate must be a number >= 0, got -0.0001"),
        ("min_learning_rate", 1.0, "--min-learning-rate must be at most --learning-rate (0.0006), got 1.0"),
        ("beta1", 1.0, "--beta1 must be a number >= 0 and < 1, got 1.0"),
        ("weight_decay", -0.1, "--weight-decay must be a number >= 0, got -0.1"),
        ("adam_epsilon", 0.0, "--adam-epsilon must be a number > 0, got 0.0"),
        (
            "qk_learning_rate_factor",
            0.0,
            "--qk-learning-rate-factor must be a number > 0 and <= 1, got 0.0",
        ),
        (
            "qk_learning_rate_factor",
            1.5,
            "--qk-learning-rate-factor must be a number > 0 and <= 1, got 1.5",
        ),
        ("grad_clip", float("inf"), "--grad-clip must be a number >= 0, got inf"),
        ("softcap", 0.0, "--softcap must be a number > 0, got 0.0"),
        ("z_loss", -1.0, "--z-loss must be a number >= 0, got -1.0"),
        ("z_loss", None, "--z-loss must be a number >= 0, got None"),
        ("qk_clip", 0, "--qk-clip must be a number > 0, got 0"),
        ("peak_tflops", 0, "--peak-tflops must be a number > 0, got 0"),
        ("short_convolution", 1, "--short-convolution must be an integer >= 2, got 1"),
        ("sink_logits", 1, "--sink-logits must be True or False, got 1"),
        ("on_spike", "ignore", "--on-spike must be one of report, stop, rollback, got 'ignore'"),
        ("rollback_steps", 0, "--rollback-steps must be an integer >= 1, got 0"),
        ("skip_batches", -1, "--skip-batches must be an integer >= 0, got -1"),
        ("max_rollbacks", -1, "--max-rollbacks must be an integer >= 0, got -1"),
        ("schedule", "linear", "--schedule must be one of cosine, constant, wsd, got 'linear'"),
        ("precision", "fp16", "--precision must be one of fp32, bf16, got 'fp16'"),
        ("device", "tpu", "--device must be one of auto, cpu, cuda, got 'tpu'"),
        ("position_embedding", "sin", "--position-embedding must be one of learned, rope, alibi, none"),
        ("attention_precision", "fp8", "--attention-precision must be one of input, fp64, fp32, bf16, bf16-"),
        ("token_order", "random", "--token-order must be one of text, permuted, interleaved, got 'random'"),
        ("interleave", 0, "--interleave must be an integer >= 1, got 0"),
        ("monitor_row_range", 1, "--monitor-row-range must be True or False, got 1"),
        ("compile", "yes", "--compile must be True or False, got 'yes'"),
        ("qk_norm", 1, "--qk-norm must be True or False, got 1"),
        ("warmup_steps", 1000, "--warmup-steps must be below the end of the cosine (1000: --schedule-steps"),
    ],
)
def test_wrong_value_is_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**{name: value})


def test_all_heads_global_excludes_a_number_of_global_heads() -> None:
    with pytest.raises(ValueError, match="--global-heads does not go with --mhsa"):
        settings(mhsa=True, global_heads=1)


@pytest.mark.parametrize("token_order", ["permuted", "interleaved"])
def test_documents_are_not_separate_where_their_tokens_are_mixed(token_order: str) -> None:
    with pytest.raises(
        ValueError, match=f"--separate-documents does not go with --token-order {token_order}"
    ):
        settings(separate_documents=True, token_order=token_order)
    assert settings(separate_documents=True).token_order == "text"


def test_documents_are_not_separate_where_the_kernel_has_no_segments() -> None:
    with pytest.raises(ValueError, match="does not go with --attention-precision sdpa-bf16"):
        settings(separate_documents=True, attention_precision="sdpa-bf16")


def test_every_precision_of_attention_has_its_flag() -> None:
    assert get_args(AttentionPrecision) == ATTENTION_PRECISIONS


def test_a_sequence_has_as_many_tokens_as_pieces() -> None:
    with pytest.raises(
        ValueError, match=re.escape("--interleave must be at most --sequence-length (8), got 9")
    ):
        settings(token_order="interleaved", interleave=9, sequence_length=8)
    assert settings(token_order="interleaved", interleave=8, sequence_length=8).interleave == 8
    assert settings(sequence_length=8).interleave > 8


@pytest.mark.parametrize(("name", "value"), [("probe", True), ("stop_at_loss", 2.0)])
def test_what_validation_measures_needs_validation(name: str, value: Any) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} needs --evaluate-every >= 1, got 0"):
        settings(evaluate_every=0, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay_steps": 5}, "--decay-steps goes only with --schedule wsd, got cosine"),
        (
            {"schedule": "wsd", "steps": 10, "warmup_steps": 5, "decay_steps": 6},
            "must be at most the 10 steps",
        ),
        ({"schedule": "wsd", "decay_steps": 0}, "--decay-steps must be an integer >= 1, got 0"),
        ({"stop_at_loss": 0.0}, "--stop-at-loss must be a number > 0, got 0.0"),
    ],
    ids=str,
)
def test_what_contradicts_the_schedule_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)


def test_the_row_range_needs_measurements() -> None:
    with pytest.raises(ValueError, match="--monitor-row-range needs --monitor-every >= 1, got 0"):
        settings(monitor_row_range=True, monitor_every=0)


def test_qk_clip_excludes_qk_norm() -> None:
    with pytest.raises(ValueError, match="--qk-clip does not go with --qk-norm"):
        settings(qk_clip=100.0, qk_norm=True)


def test_warmup_may_outlast_a_constant_schedule_and_the_run() -> None:
    assert settings(schedule="constant", warmup_steps=5000).warmup_steps == 5000
    assert settings(warmup_steps=2000, schedule_steps=600_000, steps=600).warmup_steps == 2000


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (600, 60), (50_000, 2000)])
def test_defaults_of_the_schedule_follow_the_steps(steps: int, warmup: int) -> None:
    assert settings(steps=steps, learning_rate=1e-3).schedule_or_defaults() == (warmup, steps, 1e-4)


def test_given_schedule_is_kept() -> None:
    given = settings(steps=600, warmup_steps=7, schedule_steps=100, min_learning_rate=0.0)
    assert given.schedule_or_defaults() == (7, 100, 0.0)


def test_only_given_model_settings_override_the_preset() -> None:
    given = settings(window=32, global_heads=0, qk_norm=False, layers=3)
    assert given.model_overrides() == {
        "local_window": 32, "num_global_heads": 0, "qk_norm": False, "num_hidden_layers": 3
    }  # fmt: skip


def test_model_settings_are_fields_of_both_configs() -> None:
    assert set(MODEL_SETTINGS) <= {field.name for field in fields(TrainConfig)}
    assert set(MODEL_SETTINGS.values()) <= set(LongShortConfig().to_dict())


def test_paths_are_paths_and_flags_have_hyphens() -> None:
    assert settings().out == Path("run")
    assert flag("micro_batch_size") == "--micro-batch-size"
