import io
import json
from types import SimpleNamespace

import pytest

from longshort.cli import main
from longshort.model import kv_bytes
from longshort.training.trained import open_trained


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
        (["--seed", str(2**63)], "--seed must be an integer >= 0 and < 2**63"),
        (["--prompt", "\udcff"], "--prompt must be UTF-8 text"),
        (["--threads", "0"], "--threads"),
        (["--device", "abacus"], "--device"),
        (["--greedy", "--top-k", "3"], "--greedy samples nothing"),
        (["--greedy", "--temperature", "1"], "--greedy samples nothing"),
        (["--prefill-chunk", "0"], "--prefill-chunk"),
        (["--prompt", "", "--prompt-file", "f"], "--prompt and --prompt-file exclude each other"),
        (["--each-line", "--prompt", "a"], "--each-line is about the lines of --prompt-file"),
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


@pytest.mark.parametrize(
    ("document_start", "prompt_tokens"), [("at-end-of-text", 5), ("after-end-of-text", 4), (None, 4)]
)
def test_documents_begin_where_those_of_the_training_did(run, capsys, document_start, prompt_tokens):
    config = json.loads((run / "config.json").read_text())
    config["training"]["separate_documents"] = True
    config["document_start"] = document_start
    if document_start is None:  # as earlier versions wrote it
        del config["document_start"]
    (run / "config.json").write_text(json.dumps(config))
    record = json.loads(generated(capsys, run, "--prompt", "word", "--max-new-tokens", "2", "--json"))
    assert record["prompt_tokens"] == prompt_tokens


def test_speed_and_cache_are_told_on_stderr_in_one_line(trained, capsys):
    capsys.readouterr()
    assert main(["generate", str(trained), "--prompt", "word", "--max-new-tokens", "9", "--seed", "1"]) == 0
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert message.startswith("9 tokens: first token after ")
    assert " tokens/s, cache " in message


def test_json_is_all_of_stdout(trained, capsys):
    (line,) = generated(
        capsys, trained, "--prompt", "wörd", "--max-new-tokens", "9", "--seed", "1", "--json"
    ).splitlines()
    record = json.loads(line)
    plain = generated(capsys, trained, "--prompt", "wörd", "--max-new-tokens", "9", "--seed", "1")
    assert plain == record["prompt"] + record["text"] + "\n"
    assert record["prompt"] == "wörd"
    assert (record["tokens"], record["prompt_tokens"], record["seed"]) == (9, 6, 1)
    assert record["seconds_to_first_token"] > 0 and record["tokens_per_second"] > 0
    model = open_trained(trained).model
    assert record["cache_bytes"] == kv_bytes(model.config, 6 + 8, model.dtype)  # the last is not read
    assert len(record) == 8


def test_chunks_of_the_prompt_give_the_same_text(trained, capsys):
    flags = ["--prompt", "word1 word8 word15", "--max-new-tokens", "9", "--seed", "1"]
    assert generated(capsys, trained, *flags, "--prefill-chunk", "4") == generated(capsys, trained, *flags)


def texts(capsys, run, file, *flags):
    out = generated(
        capsys, run, "--prompt-file", str(file), "--max-new-tokens", "3", "--seed", "1", "--json", *flags
    )
    return [json.loads(line) for line in out.splitlines()]


def test_a_file_is_one_prompt(trained, capsys, tmp_path):
    file = tmp_path / "prompt"
    file.write_bytes("\ufeffwörd\n\nword\n".encode())
    (record,) = texts(capsys, trained, file)
    assert record["prompt"] == "wörd\n\nword\n"


def test_stdin_is_a_file(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a\nb")))
    assert [record["prompt"] for record in texts(capsys, trained, "-", "--each-line")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.txt", "word 1\r\n\n  \nx\u2028y"),
        ("lines.jsonl", '{"prompt": "word 1", "more": 2}\n\n{"prompt": "x\\u2028y"}\n'),
    ],
)
def test_each_line_is_a_prompt_with_the_text_that_it_has_alone(trained, capsys, tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content, newline="")
    records = texts(capsys, trained, file, "--each-line")
    assert [record["prompt"] for record in records] == ["word 1", "x\u2028y"]
    for record in records:
        alone = generated(
            capsys, trained, "--prompt", record["prompt"], "--max-new-tokens", "3", "--seed", "1"
        )
        assert alone == record["prompt"] + record["text"] + "\n"


def test_speed_of_many_prompts_is_one_line_too(trained, capsys, tmp_path):
    file = tmp_path / "lines"
    file.write_text("a\nb\n")
    flags = ["--prompt-file", str(file), "--each-line", "--max-new-tokens", "3", "--seed", "1"]
    assert main(["generate", str(trained), *flags]) == 0
    message = capsys.readouterr().err
    assert message.startswith("2 prompts, 6 tokens: first token after ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", None, "No such file"),
        ("x.txt", b"ab\xff", "must be UTF-8 text, got invalid start byte at 2"),
        ("x.txt", b"\n \n", "must hold a prompt, got empty lines only"),
        ("x.jsonl", b'\n{"text": "a"}', "x.jsonl, line 2: not an object with a prompt"),
        ("x.jsonl", b"word", "x.jsonl, line 1: not JSON"),
        ("x.jsonl", b'{"prompt": 3}', "line 1: prompt must be a string, got int"),
        ("x.jsonl", b'{"prompt": "\\udcff"}', "line 1: prompt must be UTF-8 text"),
    ],
    ids=str,
)
def test_wrong_files_fail_before_the_model_is_looked_for(fails, tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert message in fails(1, "generate", tmp_path / "no-run", "--prompt-file", file, "--each-line")


def test_a_prompt_that_does_not_fit_fails_before_another_is_answered(trained, capsys, tmp_path):
    file = tmp_path / "lines"
    file.write_text("a\n" + "b" * 40)
    assert main(["generate", str(trained), "--prompt-file", str(file), "--each-line"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "at most 0 here" in captured.err
