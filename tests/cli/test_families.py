"""The command `longshort families`."""

from longshort.cli import main


def test_the_table_has_ticks_and_reasons(tmp_path, capsys):
    path = tmp_path / "families.md"
    assert main(["families", "llama", "bloom", "qwen3", "deepseek_v3", "bart", "--out", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert "| llama | ✓ | ✓ | ✓ | ✓ |" in lines
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines if "|" in line
    }
    assert rows["qwen3"][:3] == ["✓", "✓", "✓"] and rows["deepseek_v3"][0] == "✓"
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    assert "do not dispatch attention" in reasons[rows["bloom"][0]]
    assert "QK-norm undoes such scaling" in reasons[rows["qwen3"][3]]
    assert "multi-head latent attention" in reasons[rows["deepseek_v3"][1]]
    assert any(line.startswith("- bart: no small model") for line in lines)


def test_types_that_are_none_are_refused(capsys):
    assert main(["families", "llama", "lama"]) == 2
    assert "got lama" in capsys.readouterr().err
