"""What is tried for a family of decoders, beyond the table of `longshort families`."""

from typing import Any

import pytest

from longshort.huggingface import families, layouts_of
from longshort.huggingface.families import family_support, small_decoder


@pytest.mark.parametrize("name", ["llama", "gpt_bigcode"])
def test_layouts_have_local_heads_also_with_one_kv_head(name: str) -> None:
    model = small_decoder(name)
    families._give_layouts(model)
    found = layouts_of(model)
    assert found is not None
    first = found[0]
    assert first is not None and first.windows == (3,) * 4 and first.sink_tokens == 2


@pytest.mark.parametrize("name", ["llama", "gpt_bigcode"])
def test_layouts_without_an_effect_are_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def do_nothing(model: Any, layouts: Any = None, **options: Any) -> None:
        return None

    monkeypatch.setattr(families, "apply", do_nothing)
    with pytest.raises(ValueError, match="logits are the same with windows as without"):
        families._give_layouts(small_decoder(name))


@pytest.mark.parametrize("name", ["qwen2_moe", "phimoe"])
def test_sliding_layers_are_tried_where_the_default_config_has_none(name: str) -> None:
    support = family_support(name)
    assert support.use is not None and support.use.startswith("with sliding layers: ")
    assert "sliding window is 6, which it does not pass to the attention" in support.use
    assert support.watch is None


def test_a_hybrid_is_given_no_sliding_layers() -> None:
    assert not families._may_slide(small_decoder("minimax").config)
    assert families._may_slide(small_decoder("phimoe").config)
    assert family_support("gpt-sw3").model_type == "gpt-sw3"  # its models call themselves gpt2
