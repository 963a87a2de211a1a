"""What `serve --run` and `--check` promise: a server that answers, no process left whichever way out is taken, honest verdicts."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from reapkit import fidelity, probes, servers
from reapkit.checkpoint import Checkpoint
from reapkit.cli import app
from reapkit.errors import OutputError, ResourceError, ServerError, UsageError
from reapkit.modules import load_tokenizer
from reapkit.observation import Run
from streaming import full_model

FAKE = Path(__file__).parent / "fake_vllm.py"
MODEL = Path(__file__).parents[1] / "models" / "m2-nano"
PATIENCE_S = 60.0


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """An environment with an executable `vllm` that is none."""
    program = tmp_path / "environment" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program.parents[1]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[psutil.Process]]]:
    """The processes of the fake server that still run, which are ended after the test whatever it found."""
    file = tmp_path / "pids"
    monkeypatch.setenv("FAKE_PIDS", str(file))

    def alive() -> list[psutil.Process]:
        assert file.exists(), "the fake server never began"
        found = []
        for pid in map(int, file.read_text().split()):
            try:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    yield alive
    if file.exists():
        for process in alive():
            process.kill()


def words(fake: Path, tmp_path: Path, *more: str) -> list[str]:
    return ["serve", str(MODEL), "--run", "--program", str(fake), "--port", "0", "--log", str(tmp_path / "log"), *more]


def start(fake: Path, tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, waited for until the server is healthy."""
    process = subprocess.Popen(
        [sys.executable, "-m", "reapkit", *words(fake, tmp_path, *more)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if "Ctrl-C ends it" in line:
            return process
    pytest.fail("".join(heard))


def until_gone(alive: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    deadline = time.monotonic() + PATIENCE_S
    while (left := alive()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_and_all_that_it_started(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    process = start(fake, tmp_path)
    assert len(family()) == 3
    process.send_signal(signum)
    assert process.wait(PATIENCE_S) == code
    assert family() == []


def test_a_kill_that_runs_no_handler_ends_the_servers_group(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path
) -> None:
    """The one that left the group cannot be known of then: it alone is left."""
    process = start(fake, tmp_path)
    group = [member for member in family() if os.getpgid(member.pid) == family()[0].pid]
    assert len(group) == 2
    process.kill()
    process.wait(PATIENCE_S)
    assert until_gone(lambda: [member for member in family() if member in group]) == []


def test_a_server_that_ends_at_start_is_quoted_and_its_children_ended(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "start")
    result = CliRunner().invoke(app, words(fake, tmp_path))
    assert result.exit_code == 1
    assert (
        "the server ended with exit code 7" in result.stderr and "ValueError: no kernel for this card" in result.stderr
    )
    assert str(tmp_path / "log") in result.stderr
    assert family() == []


def test_a_server_that_dies_later_is_noticed(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "later")
    result = CliRunner().invoke(app, words(fake, tmp_path))
    assert result.exit_code == 1 and "ended with exit code 9" in result.stderr
    assert family() == []


def test_a_server_that_never_answers_is_given_up(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "never")
    monkeypatch.setattr(servers, "ANNOUNCE_SECONDS", 0.3)
    result = CliRunner().invoke(app, words(fake, tmp_path, "--timeout", "2"))
    assert result.exit_code == 1 and "did not answer within 2 s" in result.stderr and "--timeout" in result.stderr
    assert "of at most 2 s: fake: loading serve" in result.stderr, "it says how far the start is"
    assert family() == []


def test_a_server_that_is_deaf_to_sigterm_is_killed(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "deaf")
    monkeypatch.setattr(servers, "GRACE_SECONDS", 0.5)
    result = CliRunner().invoke(app, words(fake, tmp_path, "--check", "--no-reference"))
    assert result.exit_code == 0, result.stderr
    assert family() == []


def test_an_error_inside_the_block_ends_the_server(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path
) -> None:
    port = servers.free_port("127.0.0.1", 0)
    command = [str(fake / "bin/vllm"), "serve", "m", "--host", "127.0.0.1", "--port", str(port)]
    with (
        pytest.raises(ZeroDivisionError),
        servers.running(command, address=f"http://127.0.0.1:{port}", log=tmp_path / "log") as server,
    ):
        server.wait_until_healthy(within_s=PATIENCE_S, announce=lambda text: None)
        raise ZeroDivisionError
    assert family() == []


def test_interrupted_while_it_waits_for_the_end_it_kills_at_once(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "deaf")
    process = start(fake, tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    assert time.monotonic() - began < servers.GRACE_SECONDS / 2
    assert family() == []


def test_it_listens_on_this_machine_alone_unless_asked_otherwise(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, words(fake, tmp_path, "--check", "--no-reference", "--json"))
    assert result.exit_code == 0, result.stderr
    described = json.loads(result.stdout)
    assert described["command"][described["command"].index("--host") + 1] == "127.0.0.1"
    assert described["address"].startswith("http://127.0.0.1:")
    verdicts = {answer["name"]: answer["verdict"] for answer in described["checks"]}
    assert verdicts == {
        "completion": "yes",
        "chat": "yes",
        "tool call": "yes",
        "long prompt": "yes",
        "greedy tokens": "skipped",
    }
    assert servers.listening("0.0.0.0", 80).address == "http://127.0.0.1:80"
    assert servers.listening("::1", None).address == "http://[::1]:8000"


def test_a_dry_run_starts_nothing_and_says_with_what_it_would(fake: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, words(fake, tmp_path, "--dry-run"))
    assert result.exit_code == 0 and result.stdout.startswith(f"{fake}/bin/vllm serve {MODEL} ")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(("fails", "name", "detail"), [
    ("mute", "chat", "neither reasoning nor an answer"), ("unparsed", "tool call", "nobody parsed"), ("garbled", "tool call", "not JSON"),
])  # fmt: skip
def test_wrong_answers_are_answered_with_exit_code_3(
    fake: Path,
    family: Callable[[], list[psutil.Process]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
    name: str,
    detail: str,
) -> None:
    monkeypatch.setenv("FAKE_FAILS", fails)
    result = CliRunner().invoke(app, words(fake, tmp_path, "--check", "--no-reference", "--json"))
    assert result.exit_code == 3
    described = json.loads(result.stdout)
    (answer,) = [answer for answer in described["checks"] if answer["verdict"] == "no"]
    assert answer["name"] == name and detail in answer["detail"] and described["ok"] is False
    assert family() == []


def test_a_model_that_answers_in_words_says_nothing_about_parsing(
    fake: Path, family: Callable[[], list[psutil.Process]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "words")
    result = CliRunner().invoke(app, words(fake, tmp_path, "--check", "--no-reference"))
    assert result.exit_code == 0 and "answered in words" in result.stdout


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_greedy_tokens_are_held_to_our_own_forward(
    fake: Path,
    family: Callable[[], list[psutil.Process]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    """A server whose tokens are the model's own passes; one that says something else at half of the places does not."""
    tokenizer = load_tokenizer(Checkpoint.open(MODEL))
    model, replies = full_model(MODEL), {}
    for text in probes.TEXTS:
        prompt = tokenizer(text)["input_ids"]
        tokens = greedily(model, prompt, probes.GREEDY_TOKENS)
        wrong = round(share * len(tokens))
        replies[json.dumps(prompt)] = [
            (token + 7) % 2048 if place < wrong else token for place, token in enumerate(tokens)
        ]
    file = tmp_path / "greedy"
    file.write_text(json.dumps(replies))
    monkeypatch.setenv("FAKE_GREEDY", str(file))
    monkeypatch.setattr(probes, "_completion", lambda client: ("yes", "", {}))
    monkeypatch.setattr(probes, "_long_prompt", lambda client, limit: ("yes", "", {}))
    result = CliRunner().invoke(app, words(fake, tmp_path, "--check", "--json"))
    (answer,) = [answer for answer in json.loads(result.stdout)["checks"] if answer["name"] == "greedy tokens"]
    assert answer["tokens"] == 4 * probes.GREEDY_TOKENS
    if share:
        assert result.exit_code == 3 and answer["wrong"] > answer["tokens"] * 0.3
    else:
        assert result.exit_code == 0 and answer["equal"] == answer["tokens"] and answer["largest_gap_nats"] == 0


def greedily(model: Any, prompt: list[int], count: int) -> list[int]:
    """By transformers' own model, without anything of reapkit."""
    tokens: list[int] = []
    step, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(count):
            output = model(step, past_key_values=cache, use_cache=True)
            step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            tokens.append(int(step))
    return tokens


def test_gaps_are_the_log_probabilities_that_a_whole_forward_gives() -> None:
    prompt, continuation = [5, 6, 7], [9, 700, 3]
    (gaps,) = fidelity.greedy_gaps(Checkpoint.open(MODEL), [(prompt, continuation)], run=Run("cpu", "float32"))
    model = full_model(MODEL)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + continuation])).logits[0].double().log_softmax(-1)
    expected = [float(logits[2 + i].max() - logits[2 + i, token]) for i, token in enumerate(continuation)]
    assert gaps == pytest.approx(expected, abs=1e-4)


def test_a_few_wrong_tokens_are_a_no_and_near_ties_are_not() -> None:
    assert probes.judged([[0.0] * 90, [0.9] * 10])[0] == "yes"
    assert probes.judged([[0.0] * 95, [1.1] * 5])[0] == "yes"
    assert probes.judged([[0.0] * 94, [1.1] * 6])[0] == "no"
    assert probes.judged([[0.0] * 90, [float("nan")] * 10])[0] == "no"


def test_checking_nobody_says_how_to_start_one() -> None:
    port = servers.free_port("127.0.0.1", 0)
    result = CliRunner().invoke(app, ["serve", str(MODEL), "--check", "--url", f"http://127.0.0.1:{port}"])
    assert (
        result.exit_code == 1 and "no server that lists a model answers" in result.stderr and "--run" in result.stderr
    )


def test_a_taken_port_and_an_impossible_one_are_refused_before_anything_starts(fake: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="cannot be taken"):
            servers.free_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match="is no port"):
        servers.free_port("127.0.0.1", 70_000)
    with pytest.raises(UsageError, match="--host"):
        servers.free_port("no.such.host.invalid", 80)
    with (
        pytest.raises(OutputError, match="cannot be written"),
        servers.running(["true"], address="", log=tmp_path / "no/log"),
    ):
        pass


def test_the_engine_is_found_by_path_environment_or_python(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake / "bin/vllm"
    assert servers.find_program("vllm", str(program)) == servers.find_program("vllm", str(fake)) == (str(program),)
    python = fake / "bin/python3"
    python.symlink_to(sys.executable)
    assert servers.find_program("vllm", str(python)) == (str(python), "-m", "vllm.entrypoints.cli.main")
    assert servers.find_program("sglang", str(python)) == (str(python),)
    monkeypatch.setenv("PATH", str(fake / "bin"))
    assert servers.find_program("vllm") == (str(program),)
    with pytest.raises(UsageError, match="there is no transformers on PATH"):
        servers.find_program("transformers")
    with pytest.raises(UsageError, match="is not an executable"):
        servers.find_program("vllm", str(fake / "bin/none"))


def test_a_log_that_holds_nothing_is_quoted_as_such(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"")
    assert "(nothing)" in servers.last_lines(tmp_path / "log")
    (tmp_path / "log").write_text("".join(f"line {number}\n" for number in range(5000)))
    assert servers.last_lines(tmp_path / "log", 2) == "  line 4998\n  line 4999"


def test_a_server_that_names_no_model_is_an_error() -> None:
    with pytest.raises(ServerError, match="no server that lists a model"):
        probes.check("http://127.0.0.1:9")
