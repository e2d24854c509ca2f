"""The named model shapes: the paper's numbers, baselines of equal size, and shapes from files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from longshort.model import PRESETS, LongShortForCausalLM, preset

PAPER = {  # layers, heads, head_dim, hidden size, positions
    "tiny": (2, 4, 16, 64, 512),
    "paper-small": (6, 6, 32, 192, 2048),
    "paper-base": (12, 12, 64, 768, 8192),
    "paper-large": (36, 20, 64, 1280, 8192),
}


def parameter_shapes(name: str, **options: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = LongShortForCausalLM(preset(name, **options))
    return {key: parameter.shape for key, parameter in model.named_parameters()}


def test_there_is_a_preset_for_every_row_of_the_table() -> None:
    assert PAPER.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_shapes(name: str) -> None:
    layers, heads, head_dim, hidden_size, positions = PAPER[name]
    config = preset(name)
    assert config.num_hidden_layers == layers
    assert config.num_attention_heads == config.num_key_value_heads == heads
    assert config.head_dim == head_dim
    assert config.hidden_size == hidden_size
    assert config.max_position_embeddings == positions
    assert config.vocab_size == (257 if name == "tiny" else 10_000)
    assert config.position_embedding == "learned" and not config.tie_word_embeddings
    window = 16 if name == "tiny" else 100
    assert {layout.windows for layout in config.head_layouts()} == {(window,) * (heads - 1) + (None,)}
    embeddings = (2 * config.vocab_size + positions) * hidden_size
    block = 12 * hidden_size**2 + 2 * hidden_size  # matrices and two norms
    parameters = sum(shape.numel() for shape in parameter_shapes(name).values())
    assert parameters == embeddings + layers * block + hidden_size


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "overrides", [{}, {"num_key_value_heads": 2, "qk_norm": True}], ids=["plain", "grouped"]
)
def test_mhsa_has_the_same_parameters(name: str, overrides: dict[str, Any]) -> None:
    baseline = preset(name, mhsa=True, **overrides)
    assert {window for layout in baseline.head_layouts() for window in layout.windows} == {None}
    assert parameter_shapes(name, mhsa=True, **overrides) == parameter_shapes(name, **overrides)


def test_overrides_reach_the_config() -> None:
    config = preset("tiny", vocab_size=99, local_window=[3, 4], position_embedding="rope", eos_token_id=7)
    assert (config.vocab_size, config.local_window, config.eos_token_id) == (99, [3, 4], 7)
    assert config.position_embedding == "rope"
    assert preset("tiny").vocab_size == 257
    # The width follows the overridden size, not the preset's.
    assert preset("tiny", hidden_size=128).intermediate_size == 6 * 128 - 8 * 16


def test_layouts_replace_the_window_of_the_preset() -> None:
    windows = [[None, 3, 3, 3], [5, 5, None, None]]
    config = preset("tiny", layouts=windows)
    assert config.layouts == windows and config.local_window is None


def test_mhsa_keeps_an_overridden_window_for_reference() -> None:
    config = preset("tiny", mhsa=True, local_window=8)
    assert config.local_window == 8 and config.head_layouts()[0].windows == (None,) * 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("huge", {}, r"preset must be one of tiny, .*paper-large, or the path of a JSON .*, got 'huge'"),
        ("tiny", {"windows": 3, "heads": 2}, r"overrides must be fields of .*got \['heads', 'windows'\]"),
        ("tiny", {"transformers_version": "1"}, "overrides must be fields"),
        ("tiny", {"mhsa": True, "num_global_heads": 2}, "mhsa .* does not go with num_global_heads=2"),
        ("tiny", {"mhsa": True, "layouts": [[1] * 4] * 2}, "mhsa .* does not go with layouts"),
        ("tiny", {"local_window": -1}, "local_window must be an integer >= 1, got -1"),
        ("tiny", {"layouts": [[1] * 4] * 2, "local_window": 5}, "layouts replaces num_global_heads and"),
    ],
)
def test_bad_presets_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name, **options)


def write_preset(folder: Path, content: Any) -> str:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_changes_the_preset_that_it_names(tmp_path: Path) -> None:
    fields = {"num_global_heads": [0, 4], "local_window": [3, 7], "qk_norm": True}
    assert preset(write_preset(tmp_path, fields)) == preset("tiny", **fields)
    fields = {"num_hidden_layers": 2, "softcap": 9.0}
    name = write_preset(tmp_path, {"preset": "paper-small", **fields})
    assert preset(name) == preset("paper-small", **fields)


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    name = write_preset(tmp_path, {"num_global_heads": [0, 4], "local_window": 3})
    config = preset(name, num_global_heads=2, local_window=5)
    assert (config.num_global_heads, config.local_window) == (2, 5)
    with pytest.raises(ValueError, match="num_global_heads must have one entry for each of 3 layers, got 2"):
        preset(name, num_hidden_layers=3)


def test_layouts_of_a_file_replace_the_window_of_the_preset(tmp_path: Path) -> None:
    windows = [[16, 16, 64, None], [2, None, None, 4]]
    name = write_preset(tmp_path, {"layouts": windows})
    config = preset(name)
    assert config.layouts == windows and config.local_window is None
    with pytest.raises(ValueError, match="layouts replaces num_global_heads and local_window"):
        preset(name, local_window=8)


def test_mhsa_of_a_file_is_all_global(tmp_path: Path) -> None:
    name = write_preset(tmp_path, {"num_global_heads": [0, 4], "local_window": [3, 7]})
    config = preset(name, mhsa=True)
    assert (config.num_global_heads, config.local_window) == (4, [3, 7])
    with pytest.raises(ValueError, match=r"mhsa .* does not go with layouts=\[\[1, 1, 1, 1\]"):
        preset(write_preset(tmp_path, {"layouts": [[1] * 4] * 2}), mhsa=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "mine.json is not JSON: "),
        ([], "mine.json must hold a JSON object, got list"),
        (
            {"preset": "huge"},
            "mine.json must be one of tiny, paper-small, paper-base, paper-large, got 'huge'",
        ),
        ({"preset": []}, "got []"),
        ({"window": 3}, "mine.json must be fields of LongShortConfig"),
        ({"local_window": "3"}, "local_window must be an integer >= 1, got '3'"),
        ({"num_global_heads": [1]}, "num_global_heads must have one entry for each of 2 layers, got 1"),
    ],
    ids=str,
)
def test_bad_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        preset(write_preset(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preset: there is no file '.*none\.json'"):
        preset(str(tmp_path / "none.json"))
