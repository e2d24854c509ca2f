import pytest

from longshort.cli import main


def generated(capsys, run, *flags):
    capsys.readouterr()
    assert main(["generate", str(run), *flags]) == 0
    return capsys.readouterr().out


def test_text_follows_the_prompt(trained, capsys):
    text = generated(capsys, trained, "--prompt", "word", "--max-new-tokens", "20")
    assert text.startswith("word")
    assert len(text.encode()) > 5


def test_it_ends_at_the_last_position_unless_told(trained, capsys):
    """The run has 32 positions, one of them taken by the token before the prompt."""
    text = generated(capsys, trained, "--prompt", "word", "--greedy", "--seed", "1")
    assert 4 < len(text) <= 31 + len("\n")


def test_a_seed_repeats_the_text(trained, capsys):
    first, again, other = (
        generated(capsys, trained, "--max-new-tokens", "25", "--seed", seed) for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_greedy_is_sampling_from_the_likeliest_alone(trained, capsys):
    greedy = generated(capsys, trained, "--greedy", "--max-new-tokens", "20")
    likeliest = generated(capsys, trained, "--top-k", "1", "--temperature", "3", "--max-new-tokens", "20")
    assert greedy == likeliest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--temperature", "0"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-k", "0"], "--top-k"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed must be below 2**63"),
        (["--prompt", "\udcff"], "--prompt must be UTF-8 text"),
        (["--threads", "0"], "--threads"),
        (["--device", "abacus"], "--device"),
        (["--greedy", "--top-k", "3"], "--greedy samples nothing"),
        (["--greedy", "--temperature", "1"], "--greedy samples nothing"),
    ],
    ids=str,
)
def test_wrong_usage(fails, trained, flags, message):
    assert message in fails(2, "generate", trained, *flags)


def test_a_run_is_needed(fails):
    fails(2, "generate")


def test_what_is_no_run_is_a_failure(fails, tmp_path):
    assert "not the folder of a run" in fails(1, "generate", tmp_path)
    assert "not the folder of a run" in fails(1, "generate", tmp_path / "nowhere")


def test_more_than_the_positions_allow_is_a_failure(fails, trained):
    message = fails(1, "generate", trained, "--prompt", "abc", "--max-new-tokens", "40")
    assert "at most 28 here, got 40" in message
