"""The journal: measurements are made once, survive an interruption, and belong to one subject."""

import pytest
import torch
from tests.conversion.models import random_llama
from transformers import AutoModelForCausalLM

from longshort.conversion.journal import Journal, fingerprint


def failing() -> None:
    raise AssertionError("measured again")


def test_what_was_measured_is_not_measured_again(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    with Journal(path, {"a": 1}) as journal:
        assert journal.remember("x", lambda: [0.1, 2**-60]) == [0.1, 2**-60]
        assert journal.remember("x", failing) == [0.1, 2**-60]
    with Journal(path, {"a": 1}) as journal:
        assert journal.knows("x")
        assert not journal.knows("y")
        assert journal.remember("x", failing) == [0.1, 2**-60]
        journal.remember("y", lambda: "text")
    with Journal(path, {"a": 1}) as journal:
        assert len(journal) == 2


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_that_was_cut_off_is_measured_again(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"a": 1}) as journal:
        journal.remember("first", lambda: 1)
        journal.remember("second", lambda: 2)
    path.write_bytes(path.read_bytes()[:-cut])
    for _ in range(2):
        with Journal(path, {"a": 1}) as journal:
            assert journal.remember("first", failing) == 1
            assert journal.remember("second", lambda: 2) == 2


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1, "b": 1}, {}])
def test_another_subject_is_refused(tmp_path, other):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"a": 1}) as journal:
        journal.remember("x", lambda: 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"holds measurements with another [ab]"):
        Journal(path, other)
    assert path.read_bytes() == before


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text("something else\nof the user's\n")
    with pytest.raises(ValueError, match="must be a journal"):
        Journal(path, {})
    assert path.read_text() == "something else\nof the user's\n"


def test_any_change_of_the_weights_changes_the_fingerprint():
    model = random_llama()
    first = fingerprint(model)
    assert fingerprint(random_llama()) == first
    seen = {first}
    for parameter in model.parameters():
        parameter.data.mul_(1.001)
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_any_change_of_what_is_computed_changes_the_fingerprint(tmp_path):
    model = random_llama()
    first = fingerprint(model)
    rope = {"rope_type": "default", "rope_theta": 50.0}
    assert fingerprint(random_llama(rope_parameters=rope)) != first  # a buffer, and the config
    assert fingerprint(random_llama(rms_norm_eps=1e-3)) != first  # the config alone
    model.config._name_or_path = "elsewhere"
    assert fingerprint(model) == first
    model.model.rotary_emb.inv_freq[-1] *= 1.001
    assert fingerprint(model) != first


def test_a_saved_model_keeps_its_fingerprint(tmp_path):
    random_llama().save_pretrained(tmp_path / "one")
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / "one")]
    loaded[0].save_pretrained(tmp_path / "two")
    loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path / "two"))
    assert fingerprint(loaded[0]) == fingerprint(loaded[1])


def test_large_weights_have_a_fingerprint():
    weights = torch.nn.ParameterList([torch.zeros(2**24 + 3)])
    before = fingerprint(weights)
    with torch.no_grad():
        weights[0][-1] = 1
    assert fingerprint(weights) != before
