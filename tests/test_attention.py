"""What attention() itself does: checks, choice of backend, autocast, compilation, sink logits."""

import pytest
import torch
from tests.attention_cases import RUNNABLE

from longshort import HeadLayout, attention, explain
from longshort.attention import BACKENDS

LAYOUT = HeadLayout((4, 4, None, None), num_kv_heads=2, sink_tokens=1)


def inputs(
    q_len: int = 12, kv_len: int = 12, dtype: torch.dtype = torch.float32, requires_grad: bool = False
):
    q = torch.randn(2, 4, q_len, 8, dtype=dtype, requires_grad=requires_grad)
    k, v = (torch.randn(2, 2, kv_len, 8, dtype=dtype, requires_grad=requires_grad) for _ in range(2))
    return q, k, v


Q, K, V = inputs()

BAD_CALLS = [
    ({"layout": (4, None)}, TypeError, r"layout must be a HeadLayout, got tuple"),
    ({"q": [1.0]}, TypeError, r"q must be a torch.Tensor, got list"),
    ({"k": None}, TypeError, r"k must be a torch.Tensor, got NoneType"),
    ({"q": Q[0]}, ValueError, r"q must be \(batch, heads, sequence, head_dim\), got shape \(4, 12, 8\)"),
    ({"q": Q.int()}, ValueError, r"q must be float64, float32, bfloat16 or float16, got torch.int32"),
    ({"v": V.double()}, ValueError, r"v must have the dtype of q \(torch.float32\), got torch.float64"),
    ({"q": Q[:, :3]}, ValueError, r"q must have the 4 heads of the layout, got 3"),
    ({"q": Q[..., :0], "k": K[..., :0], "v": V[..., :0]}, ValueError, r"q must have a head_dim >= 1"),
    ({"k": K[:, :1]}, ValueError, r"k must be .* = \(2, 2, 12, 8\) .* got \(2, 1, 12, 8\)"),
    ({"k": K[:1]}, ValueError, r"k must be .* got \(1, 2, 12, 8\)"),
    ({"k": K[..., :7]}, ValueError, r"k must be .* got \(2, 2, 12, 7\)"),
    ({"v": V[:, :, :11]}, ValueError, r"v must be .* got \(2, 2, 11, 8\)"),
    ({"k": K[:, :, :5], "v": V[:, :, :5]}, ValueError, r"q must not be longer than k \(5 keys\), got 12"),
    ({"k": K.to("meta")}, ValueError, r"k must be on the device of q \(cpu\), got meta"),
    ({"causal": 1}, ValueError, r"causal must be True or False, got 1"),
    ({"round_probabilities": None}, ValueError, r"round_probabilities must be True or False, got None"),
    ({"return_stats": "yes"}, ValueError, r"return_stats must be True or False, got 'yes'"),
    ({"scale": float("nan")}, ValueError, r"scale must be a finite number, got nan"),
    ({"scale": True}, ValueError, r"scale must be a finite number, got True"),
    ({"scale": "1"}, ValueError, r"scale must be a finite number, got '1'"),
    ({"softcap": 0.0}, ValueError, r"softcap must be > 0 or None, got 0.0"),
    ({"softcap": float("inf")}, ValueError, r"softcap must be a finite number, got inf"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, r"alibi_slopes must be a torch.Tensor, got list"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must be \(heads,\) = \(4,\), got \(3,\)"),
    ({"alibi_slopes": torch.ones(4).int()}, ValueError, r"alibi_slopes must have a floating dtype"),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, r"alibi_slopes must not require grad"),
    ({"sink_logits": torch.ones(2, 4)}, ValueError, r"sink_logits must be \(heads,\) = \(4,\)"),
    ({"sink_logits": torch.ones(4, device="meta")}, ValueError, r"sink_logits must be on the device of q"),
    ({"segment_ids": [[0] * 12] * 2}, TypeError, r"segment_ids must be a torch.Tensor, got list"),
    ({"segment_ids": torch.zeros(2, 12)}, ValueError, r"segment_ids must have an integer dtype"),
    ({"segment_ids": torch.zeros(2, 12).bool()}, ValueError, r"integer dtype, got torch.bool"),
    ({"segment_ids": torch.zeros(2, 11).int()}, ValueError, r"= \(2, 12\), got \(2, 11\)"),
    ({"backend": ["reference"]}, ValueError, r"backend must be 'auto' or one of \[.*\], got \['reference'\]"),
    ({"backend": "flash"}, ValueError, r"backend must be 'auto' or one of \[.*\], got 'flash'"),
]  # fmt: skip


@pytest.mark.parametrize("function", [attention, explain])
@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS, ids=[c[2] for c in BAD_CALLS])
def test_bad_input_is_named(function, change: dict, error: type[Exception], message: str):
    arguments = {"q": Q, "k": K, "v": V, "layout": LAYOUT, **change}
    with pytest.raises(error, match=message):
        function(**arguments)


def test_explain_names_the_backend_and_why_not_the_others():
    explanation = explain(Q.double(), K.double(), V.double(), LAYOUT)
    assert explanation.backend == "blockwise"
    refused = "q is torch.float64; the kernels compute float32 and bfloat16"
    no_gpu = "the tensors are on cpu, not on a GPU"
    of_flex = "q is torch.float64; FlexAttention computes float32, bfloat16 and float16"
    reasons = {"cpu": refused, "triton": no_gpu, "reference": "slower than blockwise", "flex": of_flex}
    assert explanation.reasons == reasons
    others = [f"{name}: not used, {reason}" for name, reason in reasons.items()]
    assert str(explanation) == "\n".join(["blockwise: used", *others])
    asked = explain(Q, K, V, LAYOUT, backend="reference", softcap=3.0, return_stats=True)
    assert asked.backend == "reference"
    not_asked = dict.fromkeys(["cpu", "blockwise"], "backend='reference' was asked for")
    assert asked.reasons.pop("flex").startswith("FlexAttention has no entropy")
    assert asked.reasons == {**not_asked, "triton": no_gpu}


def test_explain_knows_the_options_of_attention():
    with pytest.raises(TypeError, match=r"explain takes the options of attention, got \['wrong'\]"):
        explain(Q, K, V, LAYOUT, wrong=3)  # pyright: ignore[reportCallIssue]


def test_a_backend_that_cannot_serve_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "supports", lambda call: call.softcap and "no softcap")
    assert explain(Q, K, V, LAYOUT, softcap=2.0).backend == "blockwise"
    assert explain(Q, K, V, LAYOUT, softcap=2.0).reasons["cpu"] == "no softcap"
    assert explain(Q, K, V, LAYOUT).backend == "cpu"
    with pytest.raises(ValueError, match="backend 'cpu' cannot serve this call: no softcap"):
        attention(Q, K, V, LAYOUT, softcap=2.0, backend="cpu")


def test_defaults_are_those_of_causal_sdpa():
    layout = HeadLayout((None,) * 4, num_kv_heads=2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        Q, K.repeat_interleave(2, 1), V.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(attention(Q, K, V, layout), expected)


def test_last_query_is_the_last_key():
    whole = attention(Q, K, V, LAYOUT)
    for q_len in (1, 5, 11):
        torch.testing.assert_close(attention(Q[:, :, -q_len:], K, V, LAYOUT), whole[:, :, -q_len:])


def test_a_sink_logit_is_one_more_key_without_value():
    q, k, v = inputs(dtype=torch.float64)
    sink = torch.tensor([0.3, -1.0, 2.0, -torch.inf], dtype=torch.float64)
    out, stats = attention(q, k, v, LAYOUT, return_stats=True)
    with_sinks, stats_with_sinks = attention(q, k, v, LAYOUT, sink_logits=sink, return_stats=True)
    share = stats.lse.exp() / (stats.lse.exp() + sink.exp()[:, None])
    torch.testing.assert_close(with_sinks, out * share[..., None])
    torch.testing.assert_close(stats_with_sinks.lse, stats.lse)
    torch.testing.assert_close(stats_with_sinks.entropy, stats.entropy)


@pytest.mark.parametrize("backend", ["auto", *RUNNABLE])
def test_autocast_casts_like_sdpa(backend: str):
    q, k, v = inputs(requires_grad=True)
    sinks = torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, LAYOUT, sink_logits=sinks, backend=backend)
    grad = torch.autograd.grad(out.float().square().sum(), q)[0]
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    expected = attention(q, k, v, LAYOUT, sink_logits=sinks, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    expected_grad = torch.autograd.grad(expected.float().square().sum(), q)[0]
    assert torch.equal(grad, expected_grad.float())


def test_autocast_leaves_float64_alone():
    q, k, v = inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, LAYOUT)
    assert torch.equal(out, attention(q, k, v, LAYOUT))


@pytest.mark.parametrize("return_stats", [False, True])
def test_compiles_without_graph_breaks(return_stats: bool):
    """Forward and backward, with every option at once; "aot_eager" traces as the full compiler does."""
    q, k, v = inputs(q_len=9, requires_grad=True)
    options = {
        "softcap": 5.0, "alibi_slopes": torch.rand(4), "sink_logits": torch.randn(4),
        "segment_ids": torch.randint(-1, 2, (2, 12)),
    }  # fmt: skip

    def loss(q, k, v, options):
        if not return_stats:
            return attention(q, k, v, LAYOUT, **options).square().sum()
        out, stats = attention(q, k, v, LAYOUT, return_stats=True, **options)
        return out.square().sum() + torch.where(stats.lse > -1e3, stats.lse, 0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for chosen in ({}, options):
        expected = loss(q, k, v, chosen)
        actual = compiled(q, k, v, chosen)
        torch.testing.assert_close(actual, expected)
        gradients = torch.autograd.grad(actual, (q, k, v))
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v)), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_compiled_lengths_may_change():
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, LAYOUT), fullgraph=True, backend="aot_eager")
    for length in (5, 9, 17, 33):
        q, k, v = inputs(length, length)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, LAYOUT))


@pytest.mark.parametrize("backend", ["auto", "blockwise", "reference"])
def test_meta_tensors_give_shapes(backend: str):
    q, k, v = (x.to("meta") for x in inputs(q_len=5))
    out, stats = attention(q, k, v, LAYOUT, backend=backend, return_stats=True)
    assert out.device.type == "meta"
    assert (out.shape, stats.lse.shape, stats.entropy.shape) == (q.shape, q.shape[:3], (4,))
