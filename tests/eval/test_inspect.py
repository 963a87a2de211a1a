"""Through inspect-ai against a server that answers from a script: rows are scored, killed runs resume, dead servers are named.

Run by `make eval-check` in an environment of its own (setup.sh).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.eval

inspect_ai = pytest.importorskip(
    "inspect_ai", reason="no inspect-ai in this environment; tests/eval/setup.sh makes one"
)

from inspect_ai.log import read_eval_log  # noqa: E402
from scripted import Chats  # noqa: E402

from reapkit.evaluation import Cell, Sampling, Settings, evaluate  # noqa: E402
from reapkit.figures import Figure  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
SAMPLING = Sampling(temperature=0.0, top_p=None, max_tokens=64, repeats=1)
Answer = Callable[[dict[str, Any]], str | None]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose chats get what `answer` makes of the request; None closes the connection. Also the requests so far."""
    asked: list[dict[str, Any]] = []

    class Handler(Chats):
        def reply(self, body: dict[str, Any]) -> str | None:
            asked.append(body)
            return answer(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four programs and four questions."""
    folder = tmp_path / "data"
    folder.mkdir()
    programs = [
        {
            "task_id": f"HumanEval/{n}", "prompt": f'def f{n}(x):\n    """Multiply by {n}."""\n', "entry_point": f"f{n}",
            "canonical_solution": f"    return {n} * x\n", "base_input": [[1], [2]], "plus_input": [[-3]], "atol": 0,
        }
        for n in range(1, 5)
    ]  # fmt: skip
    questions = [
        {"unique_id": f"q{n}", "problem": f"{n} + {n}", "answer": f"\\frac{{{4 * n}}}{{2}}"} for n in range(1, 5)
    ]
    for name, rows in (("HumanEvalPlus.jsonl", programs), ("MATH-500.jsonl", questions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scripted(body: dict[str, Any]) -> str:
    """Programs: 1 and 2 right, 3 right on the base tests, 4 wrong. Questions: right but for the last."""
    asked = body["messages"][-1]["content"]
    if "Multiply" in asked:
        n = int(asked.partition("def f")[2][0])
        value = {1: "x", 2: "2 * x", 3: "abs(3 * x) if x < 0 else 3 * x", 4: "0"}[n]
        return f"<think>\ndef f{n}(x): wrong\n</think>\n\n```python\ndef f{n}(x):\n    return {value}\n```"
    n = int(asked[0])
    return f"<think>\\boxed{{1}}</think>It is \\boxed{{{2 * n if n < 4 else 9}}}."


def test_programs_and_mathematics_are_asked_and_scored(data: Path, tmp_path: Path) -> None:
    settings = Settings(only=("humaneval", "math500"), data_dir=data, sampling=SAMPLING)
    with serving(scripted) as (url, asked), serving(lambda body: "no") as (other, _):
        result = evaluate([f"original={url}", f"pruned={other}"], settings, out=tmp_path / "out")
        assert result.complete, result.table()
        values = {name: [cell.figure.value for cell in cells if cell.figure] for name, cells in result.rows.items()}
        assert values == {"HumanEval": [0.75, 0], "HumanEval+": [0.5, 0], "MATH-500": [0.75, 0]}
        assert result.rows["HumanEval+"][1].difference == Figure(-0.5, pytest.approx((1 / 12) ** 0.5))
        assert len(asked) == 8 and {(body["temperature"], body["max_tokens"]) for body in asked} == {(0.0, 64)}
        assert result.rows["HumanEval"][0].tokens == 8 and result.rows["HumanEval"][0].max_tokens == 64
        # A second call asks for nothing, and so does one after which only the table was lost.
        evaluate([f"original={url}", f"pruned={other}"], settings, out=tmp_path / "out")
        (tmp_path / "out/eval.json").unlink()
        again = evaluate([f"original={url}", f"pruned={other}"], settings, out=tmp_path / "out")
        assert len(asked) == 8 and again.rows["MATH-500"][0].scores == result.rows["MATH-500"][0].scores
    described = json.loads((tmp_path / "out/eval.json").read_text())
    assert described["settings"]["sandbox"] == "bubblewrap"
    sources = {name: problems["source"] for name, problems in described["settings"]["problems"].items()}
    assert sources == {"humaneval": "HumanEvalPlus.jsonl", "math500": "MATH-500.jsonl"}
    assert list((tmp_path / "out/logs/original").glob("*.eval"))


def test_replies_of_a_server_that_was_started_again_are_remembered_as_long_as_it_is_the_same_model(
    data: Path, tmp_path: Path
) -> None:
    """A checkpoint's server is given another port by every run."""
    model, program = tmp_path / "model", tmp_path / "vllm"
    model.mkdir()
    (model / "config.json").write_text("{}")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("scripted.py")} "$@"\n')
    program.chmod(0o755)
    settings = Settings(only=("math500",), data_dir=data, sampling=SAMPLING, vllm=str(program))

    def asked() -> int:
        """By a run after which only the table was lost."""
        result = evaluate([f"m={model}"], settings, out=tmp_path / "out")
        assert result.complete, result.table()
        (tmp_path / "out/eval.json").unlink()
        return (tmp_path / "out/logs/m/vllm.log").read_text().count("POST")

    assert asked() == 4
    assert asked() == 0
    (model / "config.json").write_text('{"another": "model"}')
    assert asked() == 4
    settings = replace(settings, serve_arguments=("--dtype", "float32"))
    assert asked() == 4


def test_the_key_of_a_server_is_sent_and_not_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the logs, which are archives, nor in what is remembered, nor when the server repeats it."""
    key = "sk-of-a-server-9876"
    monkeypatch.setenv("REAPKIT_API_KEY", key)
    settings = Settings(only=("math500", "tau2-telecom"), data_dir=data, limit=1, sampling=SAMPLING, message_limit=2)
    with serving(scripted) as (url, asked), serving(lambda body: "###STOP###") as (user, _):
        assert evaluate([f"m={url}"], replace(settings, user=user), out=tmp_path / "out").complete
        assert asked
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".eval", ".json", ".md"}
    for path in files:
        contents = [path.read_bytes()]
        if path.suffix == ".eval":
            # Members are compressed in a way that zipfile may not know.
            contents = [read_eval_log(str(path)).model_dump_json().encode()]
        assert contents[0] and not any(key.encode() in content for content in contents), path


def test_repeats_are_asked_anew_and_averaged_by_problem(data: Path, tmp_path: Path) -> None:
    count = {"n": 0}

    def alternating(body: dict[str, Any]) -> str:
        count["n"] += 1
        return scripted(body) if count["n"] % 2 else "\\boxed{0}"

    settings = Settings(only=("math500",), data_dir=data, limit=2, sampling=Sampling(max_tokens=64, repeats=4))
    with serving(alternating) as (url, asked):
        [cell] = evaluate([f"m={url}"], settings, out=tmp_path / "out").rows["MATH-500"]
    assert (
        len(asked) == 8 and cell.scores.keys() == {"q1", "q2"} and cell.figure is not None and 0 < cell.figure.value < 1
    )


def test_the_room_for_a_reply_is_what_the_server_has_and_is_recorded(data: Path, tmp_path: Path) -> None:
    settings = Settings(only=("math500",), data_dir=data, limit=1)
    with serving(scripted) as (url, asked):
        [cell] = evaluate([f"m={url}"], settings, out=tmp_path / "out").rows["MATH-500"]
        # Of 32,768 tokens, 4,096 are left to the prompt.
        assert cell.max_tokens == 28672 and [body["max_tokens"] for body in asked] == [28672]


def test_a_killed_run_loses_no_reply_that_it_had(data: Path, tmp_path: Path) -> None:
    """The run is killed while its third question waits; the next run asks for what was in flight and what was not asked yet."""
    waiting, released = threading.Event(), threading.Event()

    def slow(body: dict[str, Any]) -> str:
        if body["messages"][-1]["content"].startswith("3") and not released.is_set():
            waiting.set()
            released.wait(60)
        return scripted(body)

    with serving(slow) as (url, asked):
        command = [sys.executable, "-m", "reapkit", "eval", f"m={url}", "--only", "math500", "--data-dir", str(data), "--max-tokens", "64",
                   "-o", str(tmp_path / "out")]  # fmt: skip
        process = subprocess.Popen(command, start_new_session=True)
        assert waiting.wait(120)
        deadline = time.monotonic() + 60
        while len(asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2)  # what was answered is being kept
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        released.set()
        before = len(asked)
        assert subprocess.run(command, check=False).returncode == 0
        assert [body["messages"][-1]["content"][0] for body in asked[before:]] == ["3"]
    assert json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"][0]["cells"][0]["value"] == 0.75


def test_a_killed_run_leaves_no_grader_behind(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import multiprocessing, os, signal\nfrom reapkit.grading import grading\n"
        "if __name__ == '__main__':\n    with grading() as grader:\n        assert grader.submit('2', '2').result()\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True)\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("only", ["math500", "tau2-telecom"])
def test_a_server_that_dies_is_the_cells_reason_and_no_zero(data: Path, tmp_path: Path, only: str) -> None:
    with serving(lambda body: "\\boxed{2}") as (user, _), serving(lambda body: None) as (_, asked):

        def stop_when_asked() -> None:
            while not asked:
                time.sleep(0.01)
            closing.__exit__(None, None, None)

        closing = serving(lambda body: None)
        gone, seen = closing.__enter__()
        asked = seen
        threading.Thread(target=stop_when_asked, daemon=True).start()
        settings = Settings(only=(only,), data_dir=data, limit=1, sampling=SAMPLING, user=user, message_limit=2)
        result = evaluate([f"m={gone}"], settings, out=tmp_path / "out")
    for (cell,) in result.rows.values():
        assert (
            cell.figure is None
            and cell.reason is not None
            and cell.reason.startswith("the server died during the run: no server answers")
        )


def test_telecom_needs_a_user_and_runs_with_one(data: Path, tmp_path: Path) -> None:
    settings = Settings(only=("tau2-telecom",), limit=2, sampling=SAMPLING, message_limit=2)
    with serving(lambda body: "Hello.") as (url, asked), serving(lambda body: "###STOP###") as (user, _):
        [cell] = evaluate([f"m={url}"], settings, out=tmp_path / "out").rows["tau2-bench Telecom"]
        assert cell == Cell(None, "needs a model that plays the user: --user URL")
        result = evaluate([f"m={url}"], replace(settings, user=user), out=tmp_path / "out")
        [cell] = result.rows["tau2-bench Telecom"]
        assert cell.figure is not None and cell.figure.value == 0 and len(cell.scores) == 2 and not asked
    assert result.settings["user_simulator"] == {"source": user, "identity": "scripted"}


def test_a_users_own_task_is_a_row_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import Sample\nfrom inspect_ai.scorer import includes\n"
        "@task\ndef capitals():\n    return Task(dataset=[Sample(input='France?', target='Paris'), Sample(input='Peru?', target='Lima')],"
        " scorer=includes())\n"
    )
    with serving(lambda body: "Paris") as (url, _):
        result = evaluate([f"m={url}"], Settings(suite=str(file), sampling=SAMPLING), out=tmp_path / "out")
    assert result.rows["capitals"][0].figure == Figure(0.5, 0.5)


def test_m2_nanos_domains_are_scored_by_their_references(tmp_path: Path) -> None:
    sys.path.insert(0, str(REPOSITORY / "examples/m2_nano"))
    import inspect_tasks

    for domain in ("python", "arithmetic", "tools", "lookup"):
        for row in inspect_tasks.read_rows(domain)[:16]:
            turn = row["messages"][-1]
            calls = [
                inspect_tasks.ToolCall(
                    id=str(n), function=call["function"]["name"], arguments=call["function"]["arguments"]
                )
                for n, call in enumerate(turn.get("tool_calls", []))
            ]
            assert inspect_tasks.is_right(row, f"<think>x</think>\n\n{turn['content']}", calls)
            assert not inspect_tasks.is_right(row, "no", [])
            assert len(inspect_tasks.messages(row)) == len(row["messages"]) - 1
