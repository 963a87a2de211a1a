"""Programs in the sandbox reach nothing, take nothing down with them, and cannot say that they are right."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reapkit import sandbox as module
from reapkit.errors import SandboxError, UsageError
from reapkit.programs import Expected, Problem, judge
from reapkit.sandbox import Sandbox, find
from reapkit.sandboxed import Digest, Opaque, decoded, encoded, encoded_output

MIB = 1 << 20


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """bubblewrap with small limits; a skip where it does not work, which REAPKIT_REQUIRE_EVAL=1 makes a failure."""
    try:
        found = find("bubblewrap")
    except SandboxError as error:
        if os.environ.get("REAPKIT_REQUIRE_EVAL") == "1":
            pytest.fail(error.message)
        pytest.skip(error.message)
    return replace(found, wall_seconds=60.0, memory_bytes=512 * MIB, cpu_seconds=5, processes=32)


def outcome(sandbox: Sandbox, code: str, *arguments: Any) -> Any:
    """What a function `f` returns, or the line that says why it does not."""
    ran = sandbox.call(code, "f", [arguments], [4.0])
    if len(ran.lines) == 2 and "out" in ran.lines[1]:
        return decoded(ran.lines[1]["out"])
    return {"lines": ran.lines[-1:], "problem": ran.problem}


def test_a_program_runs_and_its_outputs_come_back_typed(sandbox: Sandbox) -> None:
    code = "import numpy\ndef f(x):\n    return [x, (1, 2.5), {3}, {'a': None}, 2**200, 1j, b'x', float('nan') != 0, numpy.int64(4)]\n"
    assert outcome(sandbox, code, (1, 2)) == [(1, 2), (1, 2.5), {3}, {"a": None}, 2**200, 1j, b"x", True, 4]
    ran = sandbox.call("def f(x):\n    return 1 // x\n", "f", [[1], [0], [1]], [1.0] * 3)
    assert [set(line) for line in ran.lines] == [{"ready"}, {"out", "seconds"}, {"error"}] and ran.problem is None


def test_the_network_is_not_there(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\ndef f():\n    socket.create_connection(('127.0.0.1', {port}), timeout=2)\n    return 'reached'\n"
        assert "reached" not in str(outcome(sandbox, code))
        outside = {}
        exec(code, outside)
        assert outside["f"]() == "reached"  # the server is there, and the sandbox alone is in the way


def test_home_and_other_files_of_the_user_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a key")
    for path in (secret, Path.home(), Path(__file__), Path("/etc/passwd"), Path("/root"), Path("/home")):
        code = "import os\ndef f(path):\n    return os.listdir(path) if os.path.isdir(path) else open(path).read()\n"
        assert "FileNotFoundError" in str(outcome(sandbox, code, str(path))), path
    assert outcome(sandbox, "import os\ndef f():\n    return dict(os.environ)\n").keys() <= {
        "PWD",
        "LC_CTYPE",
        "LD_LIBRARY_PATH",
    }


def test_nothing_can_be_written_but_a_small_temporary_folder(sandbox: Sandbox) -> None:
    code = """
import os
def f():
    written = []
    for folder in ('/', '/usr', '/bin', '/usr/bin', '/python', '/packages', '/packages/numpy', '/proc/sys/kernel', '/dev', '/tmp'):
        try:
            with open(os.path.join(folder, 'x'), 'w') as stream:
                stream.write('x')
            written.append(folder)
        except OSError:
            pass
    return written
"""
    assert outcome(sandbox, code) == ["/tmp"]
    fill = """
def f():
    with open('/tmp/x', 'wb') as stream:
        for _ in range(100):
            stream.write(bytes(2**20))
    return 'filled'
"""
    assert "filled" not in str(outcome(sandbox, fill))
    assert not Path("/tmp/x").exists()


def test_rights_do_not_come_back(sandbox: Sandbox) -> None:
    code = """
import os, resource
def f():
    got = []
    for name, attempt in {
        'root': lambda: os.setuid(0),
        'memory': lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2),
        'namespace': lambda: os.unshare(os.CLONE_NEWNS) if hasattr(os, 'unshare') else 1 / 0,
        'nice': lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
        'chroot': lambda: os.chroot('/tmp'),
    }.items():
        try:
            attempt()
            got.append(name)
        except (OSError, ValueError, ArithmeticError):
            pass
    return got, os.getuid(), os.geteuid()
"""
    assert outcome(sandbox, code) == ([], 65534, 65534)


def test_a_fork_bomb_ends_with_its_sandbox(sandbox: Sandbox) -> None:
    before = count_of_nobody()
    code = """
import os, time
def f():
    made = 0
    while True:
        try:
            if os.fork() == 0:
                while True:
                    time.sleep(1)
            made += 1
        except OSError:
            return made
"""
    assert 1 <= outcome(sandbox, code) <= 32
    loud = "import os\ndef f():\n    while True:\n        try:\n            os.fork()\n        except OSError:\n            pass\n"
    started = time.monotonic()
    assert (
        "out" not in str(outcome(replace(sandbox, wall_seconds=3.0), loud)["lines"]) and time.monotonic() - started < 30
    )
    deadline = time.monotonic() + 20
    while count_of_nobody() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert count_of_nobody() <= before


def count_of_nobody() -> int:
    return sum(1 for status in Path("/proc").glob("[0-9]*/status") if "65534" in _uids(status))


def _uids(status: Path) -> list[str]:
    try:
        return next(line.split()[1:] for line in status.read_text().splitlines() if line.startswith("Uid:"))
    except (OSError, StopIteration):
        return []


def test_a_memory_bomb_meets_its_limit(sandbox: Sandbox) -> None:
    bomb = "def f():\n    held = []\n    while True:\n        held.append(bytearray(2**24))\n"
    assert "MemoryError" in str(outcome(sandbox, bomb))
    assert outcome(sandbox, "def f():\n    return len(bytearray(2**28))\n") == 2**28


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    while True:\n        pass\n",
        "while True:\n    pass\ndef f(): return 1\n",
        "def f():\n    try:\n        while True:\n            pass\n    except BaseException:\n        f()\n",
        "import signal\ndef f():\n    signal.signal(signal.SIGPROF, signal.SIG_IGN)\n    while True:\n        pass\n",
    ],
    ids=["plain", "at import", "catches everything", "ignores the signal"],
)
def test_an_endless_loop_ends(sandbox: Sandbox, code: str) -> None:
    ran = replace(sandbox, cpu_seconds=2).call(code, "f", [[]], [0.5])
    assert not any("out" in line for line in ran.lines)
    assert ran.problem is not None or "out of time" in str(ran.lines)


def test_a_program_that_only_waits_ends_too(sandbox: Sandbox) -> None:
    started = time.monotonic()
    ran = replace(sandbox, wall_seconds=2.0).call("import time\ndef f():\n    time.sleep(1000)\n", "f", [[]], [1.0])
    assert ran.problem == "it was ended after 2 s" and time.monotonic() - started < 20


def test_its_parent_is_not_there_to_be_killed(sandbox: Sandbox) -> None:
    code = f"""
import os, signal
def f():
    for pid in (os.getppid(), {os.getpid()}, {os.getppid()}, -1):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    return sorted(pid for pid in os.listdir('/proc') if pid.isdigit())
"""
    # The sandbox's own first process and itself are all there is.
    assert outcome(sandbox, code) == ["1", "2"]


def test_the_sandbox_dies_with_its_parent(sandbox: Sandbox, tmp_path: Path) -> None:
    before = count_of_nobody()
    script = "import time\ndef f():\n    while True:\n        time.sleep(0.05)\n"
    code = f"from reapkit.sandbox import find\nfind('bubblewrap').call({script!r}, 'f', [[]], [100.0])\n"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while count_of_nobody() <= before and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        assert count_of_nobody() > before
    finally:
        parent.kill()
        parent.wait()
    while count_of_nobody() > before and time.monotonic() < deadline + 20:
        time.sleep(0.1)
    assert count_of_nobody() <= before


PROBLEM = Problem("humaneval", "HumanEval/x", "", "f", "", ([1], [2], [3]), ([4],), 0)
WANTED = Expected((10, 20, 30), (40,), (1.0,) * 3, (1.0,), 1000)


@pytest.mark.parametrize(
    ("code", "base", "plus"),
    [
        ("def f(x):\n    return 10 * x\n", True, True),
        ("def f(x):\n    return 10 * x if x < 4 else None\n", True, False),
        ("def f(x):\n    return 10 * x + (x == 3)\n", False, False),
        # Whatever it finds to write to, no verdict is read from there.
        ("import os\ndef f(x):\n    for n in range(64):\n        try:\n            os.write(n, b'pass\\nPASS\\n{\"passed\": true}\\n')\n"
         "        except OSError:\n            pass\n    return 0\n", False, False),
        # Lines in the harness's own form say what it returned, so they must be right too.
        ("import os\ndef f(x):\n    for n in range(64):\n        try:\n            os.write(n, b'{\"out\": 10, \"seconds\": 0}\\n' * 3)\n"
         "        except OSError:\n            pass\n    os._exit(0)\n", False, False),
        ("print('pass')\nimport os\nos._exit(0)\n", False, False),
        ("import sys\ndef f(x):\n    sys.exit(0)\n", False, False),
        ("class Same:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Same()\n", False, False),
        ("class Same(int):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Same(0)\n", False, False),
        ("import builtins, json\njson.dumps = lambda *a, **k: '{\"out\": 10, \"seconds\": 0}'\ndef f(x):\n    return 0\n", False, False),
        ("def f(x:\n", False, False),
        ("def g(x):\n    return 10 * x\n", False, False),
    ],
    ids=["right", "base only", "wrong", "forged marker", "forged lines", "exits at import", "exits", "equal to all", "equal integer",
         "patched harness", "no program", "no function"],
)  # fmt: skip
def test_only_right_outputs_pass(sandbox: Sandbox, code: str, base: bool, plus: bool) -> None:
    verdict = judge(PROBLEM, code, WANTED, sandbox)
    assert (verdict.base, verdict.plus) == (base, plus), verdict.reason
    assert (verdict.reason is None) == plus


def test_a_flood_of_output_is_cut(sandbox: Sandbox) -> None:
    ran = replace(sandbox, output_bytes=MIB).call("def f():\n    return [0.5] * 900_000\n", "f", [[]], [4.0])
    assert ran.problem == "it returned more than 1 MiB"


VALUES = [
    None, True, 7, -(2**70), 0.5, float("inf"), "text", "\ud800", b"\x00", bytearray(b"a"), 1 + 2j, [1, [2]], (1, (2,)), {1, 2},
    frozenset({3}), {"a": {1: (2,)}}, {(1, 2): [3]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_survive_the_way_out_with_their_types(value: Any) -> None:
    back = decoded(json.loads(json.dumps(encoded(value), allow_nan=False)))
    assert back == value and type(back) is type(value)


def test_values_of_other_types_are_equal_to_nothing() -> None:
    back = decoded(json.loads(json.dumps(encoded(object()))))
    assert isinstance(back, Opaque) and back != back and back.kind == "builtins.object"
    for wrong in (["what", 1], {"a": 1}, ["int"], ["list", 3]):
        with pytest.raises((ValueError, IndexError, TypeError)):
            decoded(wrong)


def test_large_outputs_are_compared_by_digests() -> None:
    rows = [("a", 1, 2.5)] * 400_000

    def digest(value: Any) -> Any:
        found = decoded(encoded_output(value))
        assert isinstance(found, Digest)
        return found

    assert digest(rows) == digest([tuple(row) for row in rows])
    others = [
        [*rows[:-1], ("a", 1, 2.6)],
        [*rows[:-1], ["a", 1, 2.5]],
        tuple(rows),
        [*rows[:-1], ("a", 1, object())],
        rows * 2,
    ]
    assert len({digest(value).digest for value in (rows, *others)}) == 6
    assert digest([*rows[:-1], object()]) != digest([*rows[:-1], object()])
    numbers = set(range(1_000_001))
    assert digest(numbers) == digest(set(range(1_000_001))) != digest(numbers | {-1})
    assert digest({n: [n] for n in range(1_000_001)}) == digest({n: [n] for n in reversed(range(1_000_001))})
    assert encoded_output([1, [2]]) == encoded([1, [2]])


# --- choosing one


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "_bwrap", lambda: None)
    yield


def test_without_a_sandbox_programs_are_refused(nowhere: None) -> None:
    with pytest.raises(
        SandboxError, match="none works here: docker: not installed; bubblewrap: not installed"
    ) as caught:
        find()
    assert caught.value.hint is not None and "apt install bubblewrap" in caught.value.hint


def test_a_sandbox_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_bwrap", lambda: "/bin/false")
    monkeypatch.setattr(module, "_bubblewrap", lambda: ("/bin/false",))
    with pytest.raises(SandboxError, match=r"bubblewrap: a trial failed .*user namespaces may be forbidden here"):
        find("bubblewrap")


def test_docker_comes_first_where_its_daemon_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_why_not", lambda kind: None)
    assert find().kind == "docker"
    command = Sandbox("docker")._command("source", "name")
    for option in (
        "--network",
        "none",
        "--read-only",
        "--cap-drop",
        "ALL",
        "--pids-limit",
        "no-new-privileges",
        "--user",
    ):
        assert option in command
    monkeypatch.setattr(module, "_why_not", lambda kind: "no daemon answers" if kind == "docker" else None)
    assert find().kind == "bubblewrap"


def test_none_is_only_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("none").kind == "none"
    with pytest.raises(UsageError, match="there is no sandbox 'bubblwrap'") as caught:
        find("bubblwrap")
    assert caught.value.hint == "did you mean 'bubblewrap'?"


def test_runs_side_by_side_do_not_disturb_each_other(sandbox: Sandbox) -> None:
    results: list[Any] = [None] * 6

    def work(number: int) -> None:
        results[number] = outcome(sandbox, "def f(x):\n    return x * x\n", number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 1, 4, 9, 16, 25]
