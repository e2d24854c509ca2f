"""One optimizer step: schedule, parameter groups, accumulation, clipping, precision, validation."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longshort.data import Batch
from longshort.model import LongShortForCausalLM, preset
from longshort.training.config import TrainConfig
from longshort.training.optimization import (
    Objective,
    batch_loss,
    learning_rate_at,
    make_optimizer,
    optimizer_step,
    validation_loss,
)
from longshort.training.parallel import Ranks

LENGTH = 40
ALONE = Ranks(torch.device("cpu"))


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"preset": "tiny", "data": "data", "out": "run", "batch_size": 4, **changes})


def model() -> LongShortForCausalLM:
    torch.manual_seed(0)
    config = preset(
        "tiny", max_position_embeddings=LENGTH, hidden_size=32, num_attention_heads=2, local_window=8,
        qk_norm=True, initializer_range=0.2,
    )  # fmt: skip
    return LongShortForCausalLM(config).train()


def batch(size: int = 4, seed: int = 0) -> Batch:
    tokens = torch.randint(257, (size, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    segment_ids = (torch.arange(LENGTH) >= 15).long().expand(size, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], segment_ids)


def step(chosen: TrainConfig, trained: LongShortForCausalLM) -> tuple[float, float, list[Tensor]]:
    """Loss, norm, and the gradients that AdamW got."""
    loss, norm = optimizer_step(
        Objective(trained, chosen), make_optimizer(trained, chosen), batch(), 1e-3, chosen, ALONE
    )
    gradients = [parameter.grad for parameter in trained.parameters()]
    return loss.item(), norm.item(), [gradient for gradient in gradients if gradient is not None]


def total_norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-3 / 11), (4, 5e-3 / 11), (9, 1e-2 / 11), (10, 1e-3),
        (35, 1e-4 + 9e-4 * (0.5 + math.sqrt(0.125))), (60, 5.5e-4), (110, 1e-4), (500, 1e-4),
    ],
)  # fmt: skip
def test_cosine_after_warmup(step: int, rate: float) -> None:
    chosen = settings(learning_rate=1e-3, warmup_steps=10, schedule_steps=110, steps=50)
    assert learning_rate_at(chosen, step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("step", "rate"), [(0, 2e-3 / 3), (1, 4e-3 / 3), (2, 2e-3), (10_000, 2e-3)])
def test_constant_after_warmup(step: int, rate: float) -> None:
    chosen = settings(schedule="constant", learning_rate=2e-3, warmup_steps=2)
    assert learning_rate_at(chosen, step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 2e-3 / 3), (2, 2e-3), (89, 2e-3), (90, 2e-3), (95, 1e-3), (99, 2e-4), (100, 0.0), (500, 0.0)],
)
def test_wsd_is_constant_then_falls_to_zero(step: int, rate: float) -> None:
    chosen = settings(schedule="wsd", learning_rate=2e-3, warmup_steps=2, steps=100)
    assert learning_rate_at(chosen, step) == pytest.approx(rate, rel=1e-12)


def test_wsd_falls_where_it_is_told_to() -> None:
    chosen = settings(
        schedule="wsd", learning_rate=2e-3, warmup_steps=0, schedule_steps=50, decay_steps=20,
        min_learning_rate=1e-3,
    )  # fmt: skip
    found = [learning_rate_at(chosen, step) for step in (30, 40, 50)]
    assert found == pytest.approx([2e-3, 1.5e-3, 1e-3], rel=1e-12)


def test_the_papers_schedule_is_almost_flat_over_the_steps_that_are_run() -> None:
    chosen = settings(warmup_steps=2000, schedule_steps=600_000, steps=50_000)
    assert learning_rate_at(chosen, 49_999) > 0.98 * chosen.learning_rate


def test_only_matrices_decay() -> None:
    trained = model()
    groups = make_optimizer(trained, settings(weight_decay=0.3, beta1=0.8, beta2=0.9)).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in trained.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name
    assert all(group["betas"] == (0.8, 0.9) for group in groups)
    assert {"model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"} <= {
        name for name, parameter in trained.named_parameters() if decay[id(parameter)]
    }


def test_sinks_and_convolutions_do_not_decay() -> None:
    trained = LongShortForCausalLM(preset("tiny", sink_logits=True, short_convolution=3))
    decayed, others = make_optimizer(trained, settings()).param_groups
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    kept = {names[id(parameter)] for parameter in others["params"]}
    assert {name for name in names.values() if "sink" in name or "convolution" in name} <= kept
    assert len(kept) == 2 * 4 + 1  # two norms, sinks and a convolution per layer, and the last norm
    assert len(decayed["params"]) == len(names) - len(kept)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_z_loss_is_differentiated_and_not_reported(micro_batch_size: int | None) -> None:
    chosen = settings(z_loss=0.1, grad_clip=0, micro_batch_size=micro_batch_size)
    trained, expected = model(), model()
    loss, norm, gradients = step(chosen, trained)
    plain_loss, plain_norm, _ = step(settings(grad_clip=0), model())
    given = batch()
    output = expected(given.input_ids, shift_labels=given.labels)
    (output.loss + 0.1 * output.logits.logsumexp(-1).square().mean()).backward()
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert norm != pytest.approx(plain_norm, rel=0.1)
    for mine, parameter in zip(gradients, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
    assert validation_loss(Objective(expected, chosen), given, chosen, ALONE) == pytest.approx(
        output.loss.item(), rel=1e-6
    )


def test_step_is_adamw_with_the_given_rate() -> None:
    chosen = settings(grad_clip=0, weight_decay=0.5)
    trained, expected = model(), model()
    optimizer_step(Objective(trained, chosen), make_optimizer(trained, chosen), batch(), 1e-2, chosen, ALONE)
    batch_loss(expected, batch(), chosen, ALONE).backward()
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None
        decay = 0.0 if "norm" in name else 0.5
        first_update = parameter.grad / (parameter.grad.abs() + 1e-8)  # bias correction cancels both betas
        wanted = parameter.detach() * (1 - 1e-2 * decay) - 1e-2 * first_update
        torch.testing.assert_close(trained.get_parameter(name).detach(), wanted, rtol=1e-5, atol=1e-6)


def test_loss_is_the_mean_cross_entropy_of_all_labels() -> None:
    trained = model()
    given = batch()
    logits = trained(given.input_ids).logits
    expected = F.cross_entropy(logits.reshape(-1, 257), given.labels.reshape(-1))
    torch.testing.assert_close(batch_loss(trained, given, settings(), ALONE), expected)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 7])
def test_accumulation_equals_the_whole_batch(micro_batch_size: int) -> None:
    loss, norm, gradients = step(settings(micro_batch_size=micro_batch_size, grad_clip=0), model())
    whole_loss, whole_norm, whole_gradients = step(settings(grad_clip=0), model())
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert norm == pytest.approx(whole_norm, rel=1e-5)
    for mine, theirs in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_micro_batches_are_as_large_as_asked() -> None:
    trained = model()
    sizes = []
    trained.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    step(settings(micro_batch_size=3), trained)
    assert sizes == [3, 1]


@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 1e6])
def test_gradient_is_clipped_to_its_norm_which_is_reported_before(grad_clip: float) -> None:
    _, norm, gradients = step(settings(grad_clip=grad_clip), model())
    unclipped = total_norm(step(settings(grad_clip=0), model())[2])
    assert norm == pytest.approx(unclipped, rel=1e-5)
    assert total_norm(gradients) == pytest.approx(grad_clip if grad_clip == 0.05 else unclipped, rel=1e-4)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32() -> None:
    trained = model()
    seen = []
    projection = trained.get_submodule("model.layers.0.mlp.up_proj")
    projection.register_forward_hook(lambda module, arguments, out: seen.append(out.dtype))
    loss, _, gradients = step(settings(precision="bf16"), trained)
    assert seen == [torch.bfloat16]
    assert {tensor.dtype for tensor in [*trained.parameters(), *gradients]} == {torch.float32}
    assert loss == pytest.approx(step(settings(), model())[0], rel=0.01)


def test_separate_documents_do_not_see_each_other() -> None:
    trained = model()
    given = batch()
    other = given.input_ids.clone()
    other[:, :15] = (other[:, :15] + 1) % 257  # the first document; the labels stay

    def loss_of_second_document(input_ids: Tensor, chosen: TrainConfig) -> float:
        labels = given.labels.clone()
        labels[:, :15] = -100
        return batch_loss(trained, Batch(input_ids, labels, given.segment_ids), chosen, ALONE).item()

    apart, together = settings(separate_documents=True), settings()
    assert loss_of_second_document(other, apart) == loss_of_second_document(given.input_ids, apart)
    assert loss_of_second_document(other, together) != loss_of_second_document(given.input_ids, together)


@pytest.mark.parametrize("micro_batch_size", [None, 2, 3])
def test_validation_loss_is_the_mean_over_all_windows(micro_batch_size: int | None) -> None:
    trained = model()
    windows = batch(size=7, seed=1)
    chosen = settings(micro_batch_size=micro_batch_size)
    found = validation_loss(Objective(trained, chosen), windows, chosen, ALONE)
    assert found == pytest.approx(batch_loss(trained, windows, chosen, ALONE).item(), rel=1e-6)
    assert trained.training
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_ranks_share_the_validation_windows() -> None:
    trained = model()
    windows = batch(size=7, seed=1)
    chosen = settings(micro_batch_size=2)

    class Half(Ranks):
        def reduce_sum(self, values: Tensor) -> Tensor:
            return values  # this rank's share alone

    shares = [
        validation_loss(Objective(trained, chosen), windows, chosen, Half(torch.device("cpu"), rank, 2))
        for rank in (0, 1)
    ]
    assert sum(shares) == pytest.approx(
        validation_loss(Objective(trained, chosen), windows, chosen, ALONE), rel=1e-6
    )


def test_loss_that_is_not_finite_is_reported_as_it_is() -> None:
    trained = model()
    with torch.no_grad():
        nn.init.constant_(trained.lm_head.weight, math.inf)
    loss, norm, _ = step(settings(), trained)
    assert not math.isfinite(loss)
    assert not math.isfinite(norm)


QK_SETTINGS = {"qk_learning_rate_factor": 0.125, "adam_epsilon": 1e-3, "weight_decay": 0.5}


def grouped_model(kv_heads: int) -> LongShortForCausalLM:
    config = preset(
        "tiny", max_position_embeddings=LENGTH, hidden_size=32, num_attention_heads=4, head_dim=8,
        num_key_value_heads=kv_heads, num_global_heads=4 // kv_heads, local_window=8, initializer_range=0.2,
    )  # fmt: skip
    made = LongShortForCausalLM(config).train()
    made.draw_weights(0)
    return made


class HandWrittenAdamW:
    """AdamW in float64, with a rate for each row of a weight."""

    def __init__(self, weight: Tensor, chosen: TrainConfig, decay: float) -> None:
        self.weight = weight.detach().double().clone()
        self._mean, self._square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self._chosen, self._decay, self._steps = chosen, decay, 0

    def step(self, gradient: Tensor, rate: Tensor | float) -> None:
        gradient, beta1, beta2 = gradient.double(), self._chosen.beta1, self._chosen.beta2
        self._steps += 1
        self._mean = beta1 * self._mean + (1 - beta1) * gradient
        self._square = beta2 * self._square + (1 - beta2) * gradient**2
        mean, square = self._mean / (1 - beta1**self._steps), self._square / (1 - beta2**self._steps)
        update = mean / (square.sqrt() + self._chosen.adam_epsilon) + self._decay * self.weight
        self.weight = self.weight - rate * update


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_queries_and_keys_alone_learn_at_their_own_rate(kv_heads: int, micro_batch_size: int | None) -> None:
    chosen = settings(micro_batch_size=micro_batch_size, **QK_SETTINGS)
    trained = grouped_model(kv_heads)
    optimizer = make_optimizer(trained, chosen)
    expected = {
        name: HandWrittenAdamW(parameter, chosen, 0.0 if "norm" in name else 0.5)
        for name, parameter in trained.named_parameters()
    }
    for number, rate in enumerate((1e-3, 1e-2, 3e-3, 3e-2)):
        optimizer_step(Objective(trained, chosen), optimizer, batch(seed=number), rate, chosen, ALONE)
        for name, parameter in trained.named_parameters():
            assert parameter.grad is not None
            rates: Tensor | float = rate
            if name.endswith("qkv_proj.weight"):
                rates = torch.full((len(parameter), 1), rate, dtype=torch.float64)
                rates[: (4 + kv_heads) * 8] *= 0.125
            expected[name].step(parameter.grad, rates)
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), expected[name].weight, rtol=1e-6, atol=1e-7, msg=name
        )


def test_the_error_is_at_most_twice_that_of_a_group_of_its_own() -> None:
    chosen = settings(**QK_SETTINGS)
    trained = grouped_model(4)
    weight = trained.get_parameter("model.layers.0.attention.qkv_proj.weight")
    rows = 8 * 8
    truth = HandWrittenAdamW(weight[:rows], chosen, 0.5)
    alone = nn.Parameter(weight[:rows].detach().clone())
    plain = torch.optim.AdamW([alone], betas=(0.9, 0.95), eps=1e-3, weight_decay=0.5, fused=True)
    optimizer = make_optimizer(trained, chosen)
    for number in range(20):
        optimizer_step(Objective(trained, chosen), optimizer, batch(seed=number), 1e-2, chosen, ALONE)
        assert weight.grad is not None
        alone.grad = weight.grad[:rows].clone()
        plain.param_groups[0]["lr"] = 0.125e-2
        plain.step()
        truth.step(alone.grad, 0.125e-2)
    ours, theirs = ((found.double() - truth.weight).square().mean() for found in (weight[:rows], alone))
    assert ours.sqrt() <= 2 * theirs.sqrt()


def test_equal_rates_leave_every_bit_as_it_was() -> None:
    plain, same, slower = model(), model(), model()
    step(settings(), plain)
    step(settings(qk_learning_rate_factor=1.0, adam_epsilon=1e-8), same)
    step(settings(qk_learning_rate_factor=0.5), slower)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name)), name
        if not name.endswith("qkv_proj.weight"):
            assert torch.equal(parameter, slower.get_parameter(name)), name
