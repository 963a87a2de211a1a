"""Starting a server, waiting until it answers, and ending it with all that it started, whichever way out is taken.

A server has a session and process group of its own, so that Ctrl-C reaches it through here alone. What leaves the group is remembered while
it runs and ended too. A watcher in the group waits on a pipe from this process: should this one be killed where no handler runs, the pipe
closes and the watcher kills the group.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from reapkit.errors import OutputError, ResourceError, ServerError, UsageError

# A model of hundreds of gigabytes is read, spread and compiled before it answers; a server that hangs is not waited for all day.
START_SECONDS = 3600.0
# vLLM ends its engines within seconds of a SIGTERM; what still runs after that hangs.
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.25
# How often a waiting user hears how it goes.
ANNOUNCE_SECONDS = 15.0
LAST_LINES = 15
LOOPBACK = "127.0.0.1"
PORT = 8000

_LEASHED = 'exec 3<&0; (read -r _ <&3; kill -KILL 0) & exec "$@" 3<&- </dev/null'
# A request to one's own machine takes no proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_MODULES = {"vllm": "vllm.entrypoints.cli.main", "transformers": "transformers.cli.transformers"}


def find_program(engine: str, given: str | None = None) -> tuple[str, ...]:
    """The words that run an engine, without its verb.

    Args:
        engine: `vllm`, `sglang` or `transformers`.
        given: an executable, a Python interpreter or the folder of an environment; None looks on PATH.

    Raises:
        UsageError: there is none.
    """
    is_command = engine != "sglang"  # which is run as a module
    wanted = engine if is_command else "python"
    if given is None:
        found = shutil.which(wanted) or (None if is_command else shutil.which("python3"))
        if found is None:
            raise UsageError(
                f"there is no {wanted} on PATH",
                hint=f"install {engine} in an environment of its own and name it: --program PATH, the executable, the environment's folder "
                "or its Python",
            )
        return (found,)
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / "bin" / wanted
    if not path.is_file() or not os.access(path, os.X_OK):
        raise UsageError(
            f"{path} is not an executable", hint="--program takes an executable, an environment's folder or its Python"
        )
    if is_command and path.name.startswith("python"):
        return (str(path), "-m", _MODULES[engine])
    return (str(path),)


def free_port(host: str, port: int) -> int:
    """The port, found to be free; for 0 one that is.

    Raises:
        ResourceError: something listens there.
        UsageError: no such port or host.
    """
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port {port} is no port", hint="0 takes one that is free")
    try:
        family = socket.getaddrinfo(host, port)[0][0]
    except OSError as error:
        raise UsageError(f"--host {host!r}: {error.strerror}", hint=f"--host {LOOPBACK}") from None
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} of {host} cannot be taken: {error.strerror}",
                hint="give another --port; 0 takes one that is free",
            ) from None
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Listening:
    """Where a server listens.

    Attributes:
        host, port: as it is told; port 0 for one that is free.
        asked: whether the user named either.
    """

    host: str
    port: int
    asked: bool

    @property
    def address(self) -> str:
        """Where it answers from this machine."""
        here = LOOPBACK if self.host in ("0.0.0.0", "::") else self.host
        return f"http://[{here}]:{self.port}" if ":" in here else f"http://{here}:{self.port}"


def listening(host: str | None, port: int | None) -> Listening:
    """On this machine alone unless asked otherwise: none of the engines asks who is there."""
    return Listening(host or LOOPBACK, PORT if port is None else port, host is not None or port is not None)


@dataclass
class Server:
    """A server that runs.

    Attributes:
        process: the server itself.
        address: where it answers, like `http://127.0.0.1:8000`.
        log: the file that holds all it prints.
        started: by the monotonic clock.
    """

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    started: float = field(default_factory=time.monotonic)
    _family: set[psutil.Process] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def look(self) -> None:
        """Remember what the server has started by now, and raise ServerError where it has ended.

        Raises:
            ServerError: with its last lines.
        """
        with suppress(psutil.Error):
            self._family.update(psutil.Process(self.process.pid).children(recursive=True))
        code = self.process.poll()
        if code is not None:
            how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
            raise ServerError(
                f"the server ended {how} after {self.seconds:.0f} s; its last lines:\n{last_lines(self.log)}",
                hint=f"all it said: {self.log}",
            )

    def wait_until_healthy(self, *, within_s: float, announce: Callable[[str], None]) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: it ended, or did not answer in time.
        """
        said = time.monotonic()
        while True:
            self.look()
            if is_healthy(self.address):
                return
            if self.seconds > within_s:
                raise ServerError(
                    f"the server did not answer within {within_s:.0f} s; its last lines:\n{last_lines(self.log)}",
                    hint=f"give it longer with --timeout, or see {self.log}",
                )
            if time.monotonic() - said >= ANNOUNCE_SECONDS:
                said = time.monotonic()
                announce(
                    f"starting for {self.seconds:.0f} s of at most {within_s:.0f} s: {last_lines(self.log, 1).strip()}"
                )
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Wait until the server ends.

        Raises:
            ServerError: when it does.
        """
        while True:
            self.look()
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """End the server and all that it started: kindly, then for certain; at once when interrupted while waiting."""
        with suppress(psutil.Error):
            self._family.update(psutil.Process(self.process.pid).children(recursive=True))
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(timeout=GRACE_SECONDS)
        while True:
            try:
                self._kill()
                return
            except KeyboardInterrupt:  # pressed once more: this is what was asked for
                continue

    def _kill(self) -> None:
        # The group outlives its leader, and its number is not given anew while it has a member: the watcher is one.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for member in self._family:
            with suppress(psutil.Error):
                member.kill()  # psutil does not kill another process that got the number since
        self.process.wait()
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        psutil.wait_procs(list(self._family), timeout=GRACE_SECONDS)


@contextmanager
def running(
    command: Sequence[str], *, address: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server for as long as the block lasts.

    Args:
        command: its words.
        address: where it will answer.
        log: file for all it prints, written anew.
        environment: variables beside this process's own.

    Raises:
        OutputError: the log cannot be written.
    """
    try:
        output = log.open("wb")
    except OSError as error:
        raise OutputError(
            f"the log {log} cannot be written: {error.strerror}", hint="give another file: --log FILE"
        ) from None
    with output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _LEASHED, "sh", *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, address, log)
    try:
        yield server
    finally:
        server.end()


def is_healthy(address: str) -> bool:
    """Whether a server answers at its path for health."""
    try:
        with _OPENER.open(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    """The end of a log."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16384))
        lines = file.read().decode(errors="replace").rstrip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-count:]) or "  (nothing)"
