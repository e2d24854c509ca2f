"""A run's folder: resolved before it is made, made at once, read back, and never overwritten."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.training.runs import SettingsFor

from longshort.data import DataFolder, load_tokenizer
from longshort.model import LongShortConfig, LongShortForCausalLM, preset
from longshort.training import run as run_module
from longshort.training.run import create_run, open_same_data, plan_run, read_run, write_config


def test_config_is_resolved_and_comes_back(settings_for: SettingsFor) -> None:
    torch.set_num_threads(1)
    planned, data = plan_run(settings_for(threads=None, steps=40, kv_heads=2, softcap=20.0))
    create_run(planned, data)
    out = planned.training.out
    assert read_run(out) == planned
    training = json.loads((out / "config.json").read_text())["training"]
    unresolved = {name for name, value in training.items() if value is None}
    assert unresolved == {
        "micro_batch_size", "global_position_embedding", "keep_checkpoints", "gather_memory", "shards",
        "short_convolution", "qk_clip",
        "on_spike", "alarm", "decay_steps", "stop_at_loss", "peak_tflops",
    }  # fmt: skip
    assert (training["warmup_steps"], training["schedule_steps"], training["threads"]) == (4, 40, 1)
    assert (training["kv_heads"], training["global_heads"], training["window"]) == (2, 2, 8)
    assert Path(training["data"]).is_absolute()
    assert planned.band == 8
    assert planned.versions["torch"] == torch.__version__
    tokenizer = load_tokenizer(out / "tokenizer")
    assert LongShortConfig.from_dict(planned.model).eos_token_id == tokenizer.eos_token_id == 256


def test_model_is_the_preset_with_overrides_and_the_datas_vocabulary(settings_for: SettingsFor) -> None:
    planned, _ = plan_run(settings_for(layers=3, position_embedding="rope"))
    model = planned.build_model()
    expected = preset(
        "tiny", num_hidden_layers=3, position_embedding="rope", max_position_embeddings=48, local_window=8,
        hidden_size=32, num_attention_heads=4, head_dim=8, vocab_size=257, eos_token_id=256,
    )  # fmt: skip
    assert model.config.to_diff_dict() == LongShortForCausalLM(expected).config.to_diff_dict()


def test_weights_come_from_the_seed_and_leave_the_global_generator_alone(settings_for: SettingsFor) -> None:
    planned, _ = plan_run(settings_for(seed=5))
    mhsa, _ = plan_run(settings_for(seed=5, mhsa=True))
    other, _ = plan_run(settings_for(seed=6))
    before = torch.get_rng_state()
    weights = [run.build_model().state_dict() for run in (planned, planned, mhsa, other)]
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
        assert torch.equal(value, weights[2][name])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[3]["lm_head.weight"])
    assert mhsa.band == 8
    assert {
        window for layer in LongShortConfig.from_dict(mhsa.model).head_layouts() for window in layer.windows
    } == {None}


@pytest.mark.parametrize(
    ("fields", "changes", "band"),
    [
        ({"num_global_heads": [0, 4], "local_window": [3, 7]}, {}, 3),  # the second layer has no local head
        ({"num_global_heads": [0, 2], "local_window": [3, 7]}, {}, 7),
        ({"num_global_heads": [4, 4], "local_window": [3, 7]}, {}, 7),
        ({"num_global_heads": [0, 4]}, {"window": 5}, 5),
        ({"layouts": [[3, 9, 5, None], [None] * 4]}, {}, 9),
        ({"layouts": [[None] * 4] * 2}, {}, None),
        ({"local_window": [3, 7]}, {"mhsa": True}, 7),
    ],
    ids=str,
)
def test_model_of_a_file_is_resolved_and_comes_back(
    settings_for: SettingsFor, tmp_path: Path, fields: dict, changes: dict, band: int | None
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(fields))
    planned, data = plan_run(settings_for(**{"preset": str(file), "window": None, **changes}))
    create_run(planned, data)
    file.unlink()  # the run does not need it again
    assert read_run(planned.training.out) == planned
    assert planned.band == band
    model = LongShortConfig.from_dict(planned.model)
    expected = {
        name: value for name, value in fields.items() if name != "num_global_heads" or "mhsa" not in changes
    }
    assert {name: getattr(model, name) for name in expected} == expected
    assert planned.build_model().config.head_layouts() == model.head_layouts()


def test_missing_file_is_named_before_any_file(settings_for: SettingsFor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preset: there is no file '.*none\.json'"):
        plan_run(settings_for(preset=str(tmp_path / "none.json")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "preset must be one of tiny, paper-small, paper-base, paper-large, or the path"),
        ({"kv_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
        ({"global_heads": 5}, "num_global_heads must be"),
        ({"position_embedding": "rope", "head_dim": 7}, "head_dim must be even"),
        ({"global_position_embedding": "none"}, "global_position_embedding and position_embedding"),
        (
            {"token_order": "interleaved", "interleave": 1000, "sequence_length": None},
            r"--interleave must be at most --sequence-length \(512\), got 1000",
        ),
    ],
)
def test_setting_that_does_not_fit_is_refused_before_any_file(
    settings_for: SettingsFor, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_run(settings_for(**changes))
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_named(settings_for: SettingsFor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no data folder"):
        plan_run(settings_for(data=tmp_path / "nowhere"))


def test_empty_folder_is_taken_and_any_other_refused(settings_for: SettingsFor) -> None:
    settings = settings_for()
    settings.out.mkdir()
    create_run(*plan_run(settings))
    before = (settings.out / "config.json").read_bytes()
    message = f"--out: {settings.out} exists already; `longshort train --resume"
    with pytest.raises(FileExistsError, match=message):
        plan_run(settings)
    file = settings_for("file").out
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        plan_run(settings_for("file"))
    assert file.read_text() == "mine"
    assert (settings.out / "config.json").read_bytes() == before


def test_folder_that_appears_meanwhile_is_not_overwritten(settings_for: SettingsFor) -> None:
    planned, data = plan_run(settings_for())
    planned.training.out.mkdir()
    (planned.training.out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        create_run(planned, data)
    assert [path.name for path in planned.training.out.iterdir()] == ["notes.txt"]
    assert [path.name for path in planned.training.out.parent.iterdir()] == ["run"]


def test_full_disk_leaves_no_folder(settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, data = plan_run(settings_for())

    def full_disk(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "sync_tree", full_disk)
    with pytest.raises(OSError, match="No space left"):
        create_run(planned, data)
    assert list(planned.training.out.parent.iterdir()) == []
    monkeypatch.undo()
    create_run(planned, data)
    assert read_run(planned.training.out) == planned


def test_moved_run_knows_where_it_is(settings_for: SettingsFor, tmp_path: Path) -> None:
    planned, data = plan_run(settings_for())
    create_run(planned, data)
    moved = planned.training.out.rename(tmp_path / "moved")
    assert read_run(moved).training == replace(planned.training, out=moved)


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no config\.json"):
        read_run(tmp_path)


def test_runs_of_earlier_versions_began_documents_after_the_end_of_text(settings_for: SettingsFor) -> None:
    planned, data = plan_run(settings_for())
    create_run(planned, data)
    file = planned.training.out / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("document_start") == planned.document_start == "at-end-of-text"
    file.write_text(json.dumps(config))
    assert read_run(file.parent) == replace(planned, document_start="after-end-of-text")
    for wrong in ("E", None, []):
        file.write_text(json.dumps({**config, "document_start": wrong}))
        with pytest.raises(ValueError, match=r"config\.json is not the config of a run: .*document_start"):
            read_run(file.parent)


@pytest.mark.parametrize("text", ["{", "{}", '{"training": {"steps": 3}}', "[]"])
def test_damaged_config_is_named(settings_for: SettingsFor, text: str) -> None:
    planned, data = plan_run(settings_for())
    create_run(planned, data)
    (planned.training.out / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not the config of a run"):
        read_run(planned.training.out)


def test_config_is_replaced_at_once(settings_for: SettingsFor) -> None:
    planned, data = plan_run(settings_for())
    create_run(planned, data)
    changed = replace(planned, training=replace(planned.training, steps=99))
    write_config(planned.training.out, changed)
    assert read_run(planned.training.out) == changed
    assert {path.name for path in planned.training.out.iterdir()} == {"config.json", "tokenizer"}


def test_other_data_is_refused(settings_for: SettingsFor, data: Path) -> None:
    planned, _ = plan_run(settings_for())
    assert open_same_data(planned).path == data
    assert isinstance(open_same_data(planned), DataFolder)
    for change in ({"tokenizer_hash": "other"}, {"train_tokens": 7}, {"validation_tokens": 7}):
        other = replace(planned, data=replace(planned.data, **change))
        with pytest.raises(ValueError, match="is not the data that this run was started on"):
            open_same_data(other)
