"""Model cards: what they state, that the Hub's own reader takes them, and whose README.md they replace."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from tests.huggingface.decoders import make_decoder
from tests.model.models import SHAPES, make_model

from longshort import HeadLayout
from longshort.huggingface import CardFacts, Measurement, apply, write_model_card
from longshort.huggingface.model_card import known_facts
from longshort.model import LongShortForCausalLM


def saved(folder: Path, family: str = "llama", **arguments: Any) -> Any:
    model = make_decoder(family)
    apply(model, **(arguments or {"num_global_heads": 2, "window": 5, "sink_tokens": 1}))
    model.save_pretrained(folder)
    return model


def read(folder: Path) -> Any:
    """Read a card; what the Hub's reader makes of its metadata, written again, is the same."""
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert str(card) == (folder / "README.md").read_text()
    return card


def rows(card: Any, heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its header."""
    section = card.text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines[2:]]


def test_the_card_of_a_decoder_states_its_layouts(tmp_path: Path) -> None:
    layouts = [HeadLayout((5, 5, 9, 9, None, None), 3, 1), HeadLayout((4,) * 6, 3)]
    model = saved(tmp_path, layouts=layouts)
    assert write_model_card(model, tmp_path)
    card = read(tmp_path)
    assert card.data.to_dict() == {
        "library_name": "longshort",
        "pipeline_tag": "text-generation",
        "tags": ["longshort", "ls-attention"],
    }
    assert rows(card, "Heads") == [["0", "6", "3", "2", "5 (2), 9 (2)", "1"], ["1", "6", "3", "0", "4", "0"]]
    assert f"| parameters | {model.num_parameters():,} |" in card.text
    assert "| context length | 256 tokens |" in card.text
    assert "import longshort.huggingface " in card.text
    assert "AutoTokenizer" not in card.text  # none is there
    assert "## Training" not in card.text and "## Measurements" not in card.text
    assert "No measurements of this model are known" in card.text


def test_a_layer_that_does_not_attend_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path, "lfm2", layouts=[None, HeadLayout.split(6, 2, 5, 3)])
    write_model_card(model, tmp_path)
    assert rows(read(tmp_path), "Heads")[0][:2] == ["0", "no attention"]


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_a_saved_model_of_longshort_has_a_card(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    card = read(tmp_path)
    assert card.data.tags == ["longshort", "ls-attention"][: 1 if fields.get("num_global_heads") == 4 else 2]
    first = model.config.head_layouts()[0]
    assert rows(card, "Heads")[0][3] == str(first.windows.count(None))
    assert "import longshort.model " in card.text


def test_the_folder_that_a_model_was_loaded_from_is_not_named(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "secret")
    LongShortForCausalLM.from_pretrained(tmp_path / "secret").save_pretrained(tmp_path / "again")
    card = read(tmp_path / "again")
    assert card.data.base_model is None and "secret" not in str(card)


def test_no_card_is_written_if_it_is_not_wanted(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "without", model_card=False)
    make_model().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list(tmp_path.rglob("README.md"))


def test_facts_become_metadata_and_tables(tmp_path: Path) -> None:
    model = saved(tmp_path)
    facts = CardFacts(
        title="a | title", base_model="user/base", license="mit", datasets=["user/text"], of="step 7",
        training=[("learning rate", "3e-4"), ("text", "*.txt")],
        measurements=[
            Measurement("loss (nats per token)", 1.23456, None, "loss", "user/text", "validation"),
            Measurement("loss (nats per token)", 1.1, "step 4", "loss", "user/text", "validation"),
            Measurement("largest attention logit", 12.5),
        ],
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text("{}")
    write_model_card(model, tmp_path, facts)
    card = read(tmp_path)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("loss", 1.23456, "validation")
    assert card.data.to_dict()["model-index"][0]["name"] == "a | title"
    assert (card.data.base_model, card.data.license) == ("user/base", "mit")
    assert card.data.datasets == ["user/text"]
    assert rows(card, "Training") == [["learning rate", "3e-4"], ["text", r"\*.txt"]]
    assert rows(card, "Measurements") == [
        ["loss (nats per token)", "1.2346", "step 7", "user/text, validation"],
        ["loss (nats per token)", "1.1000", "step 4", "user/text, validation"],
        ["largest attention logit", "12.5000", "step 7", ""],
    ]
    assert "tokenizer = AutoTokenizer.from_pretrained(name)" in card.text
    known = known_facts(tmp_path)
    assert (known.base_model, known.license, known.datasets) == ("user/base", "mit", ("user/text",))


def test_an_unchanged_card_is_replaced_and_a_changed_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = saved(tmp_path), tmp_path / "README.md"
    assert write_model_card(model, tmp_path, CardFacts(title="one"))
    assert write_model_card(model, tmp_path, CardFacts(title="two"))
    assert "# two\n" in path.read_text()
    changed = path.read_text().replace("# two", "# mine")
    path.write_text(changed)
    assert caplog.text == ""
    assert not write_model_card(model, tmp_path, CardFacts(title="three"))
    assert path.read_text() == changed
    assert f"{path} was there already, and stays as it is" in caplog.text
    assert sorted(file.name for file in tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "# Mine\n",
        "---\n- not a card\n---\n",
        "---\n: [\n---\n",
        "---\n5: 6\n---\n",
        "---\ntext\n---\n",
        "---\ndatasets: 5\nlicense: 2\nbase_model: [a, b]\n---\n",
        "---\ndatasets: [1, {}]\n---\n",
    ],
)
def test_a_readme_of_the_user_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(content)
    make_model().save_pretrained(tmp_path)
    assert not write_model_card(saved(tmp_path), tmp_path)
    assert (tmp_path / "README.md").read_text() == content
    assert known_facts(tmp_path) == CardFacts()


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder must hold a saved model, got .* without a config"):
        write_model_card(make_model(), tmp_path)
    plain = make_decoder("llama")
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model must have layouts, got LlamaForCausalLM without"):
        write_model_card(plain, tmp_path)
    with pytest.raises(TypeError, match="model must be a model of transformers"):
        write_model_card(json, tmp_path)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "README.md").exists()
