"""Ctrl-C and its like through the command line: once at the next safe point, twice at once; the same command goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import disturbances
from disturbances import MODEL, NEEDS_COMPILER, Disturbance, contents
from reapkit.statistics import Statistics

ANNOUNCED = "stopping when {}; press Ctrl-C again to stop at once"
RESUMES = "interrupted; the same command goes on after the last finished wave or file"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disturbances.small_text(tmp_path_factory.mktemp("text") / "text.jsonl", 6)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    """What compressing writes, and the calls it does that with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    out = folder / "out"
    calls = disturbances.calls(disturbances.compressing(out, data), folder / "said", out)
    return contents(out), calls


def place_of(calls: list[tuple[str, str]], call: str, path: str, *, nth: int = 0) -> int:
    """The number of a call, by what it does to which file."""
    return [number for number, found in enumerate(calls, 1) if found == (call, path)][nth]


def middle_copy(calls: list[tuple[str, str]]) -> int:
    """The number of a call while shards are written, several at once."""
    copies = [number for number, (call, _) in enumerate(calls, 1) if call == "copy"]
    return copies[len(copies) // 2]


def require_whole_shards(out: Path, expected: dict[str, bytes]) -> None:
    """The files that were begun were written, none is there in part, and nothing was begun after them."""
    left = {name: content for name, content in contents(out).items() if name.startswith("model")}
    assert left and left == {name: expected[name] for name in left}
    assert "config.json" not in contents(out) and "model.safetensors.index.json" not in left


@NEEDS_COMPILER
@pytest.mark.parametrize(("stage", "signum"), [("observing", signal.SIGINT), ("writing", signal.SIGTERM)])
def test_one_signal_stops_compress_at_its_safe_point_and_the_command_goes_on(
    undisturbed: tuple[dict[str, bytes], list[tuple[str, str]]], data: Path, tmp_path: Path, stage: str, signum: int
) -> None:
    expected, calls = undisturbed
    out, said = tmp_path / "out", tmp_path / "said"
    if stage == "observing":
        at, until = place_of(calls, "write", "/reapkit/statistics.safetensors.lock"), "the running wave is done"
    else:
        at, until = middle_copy(calls), "the running files are written"
    words = disturbances.compressing(out, data)
    ended = disturbances.run(words, said, Disturbance("signal", out, at, signum))
    assert ended.code == 128 + signum
    assert [line for line in ended.said.splitlines() if "stop" in line or "interrupt" in line] == [
        ANNOUNCED.format(until),
        RESUMES,
    ]
    assert "Traceback" not in ended.said
    if stage == "observing":
        begun = Statistics.load(out / "reapkit/statistics.safetensors.unfinished", unfinished=True)
        assert (begun.finished_batches, begun.batches) == (1, 2)
    else:
        assert disturbances.require_honest(out) == "unfinished"
        require_whole_shards(out, expected)
    assert not list(out.rglob("*lock")), "whoever stops lets go"
    assert disturbances.run(words, said).code == 0
    assert contents(out) == expected


@NEEDS_COMPILER
@pytest.mark.parametrize("verb", ["observe", "prune"])
def test_the_parts_of_compress_stop_and_go_on_alone_too(
    undisturbed: tuple[dict[str, bytes], list[tuple[str, str]]], data: Path, tmp_path: Path, verb: str
) -> None:
    expected, _ = undisturbed
    out, said = tmp_path / "out", tmp_path / "said"
    compressing = disturbances.compressing(out, data)
    if verb == "observe":
        options = compressing[compressing.index("--device") :]
        words = ["observe", str(MODEL), "--data", str(data), *options, "-o", str(out / "s.safetensors")]
        disturbance = Disturbance("signal", out, 4, signal.SIGINT)  # while its lock is taken
    else:
        (tmp_path / "plan.json").write_bytes(expected["reapkit/plan.json"])
        words = ["prune", str(MODEL), str(tmp_path / "plan.json"), "-o", str(out)]
        disturbance = Disturbance("signal", out, 50, signal.SIGINT)
    ended = disturbances.run(words, said, disturbance)
    assert ended.code == 130 and RESUMES in ended.said, ended
    left = contents(out)
    if verb == "observe":
        assert left.keys() == {"s.safetensors.unfinished"}
    else:
        require_whole_shards(out, expected)
    ended = disturbances.run(words, said)
    assert ended.code == 0, ended.said
    if verb == "observe":
        assert contents(out) == {"s.safetensors": expected["reapkit/statistics.safetensors"]}
    else:
        shards = {name: content for name, content in expected.items() if name.startswith("model")}
        assert {name: content for name, content in contents(out).items() if name.startswith("model")} == shards


@NEEDS_COMPILER
def test_the_second_signal_stops_writing_at_once(
    undisturbed: tuple[dict[str, bytes], list[tuple[str, str]]], data: Path, tmp_path: Path
) -> None:
    expected, calls = undisturbed
    out, said = tmp_path / "out", tmp_path / "said"
    words = disturbances.compressing(out, data)
    at = middle_copy(calls)
    # One at every call: the third one stops the removal of the part too, as whoever presses thrice wants.
    ended = disturbances.run(words, said, Disturbance("signal on", out, at, signal.SIGINT))
    assert ended.code == 130 and "Traceback" not in ended.said, ended
    assert disturbances.require_honest(out) == "unfinished"
    assert disturbances.run(words, said).code == 0
    assert contents(out) == expected


def test_two_signals_stop_a_long_wave_at_once(tmp_path: Path) -> None:
    """Through a process as a shell starts it. All text is one wave, so stopping at its end would leave statistics."""
    data = MODEL / "data/calibration.jsonl"
    out = tmp_path / "s.safetensors"
    words = ["observe", str(MODEL), "--data", str(data), "-o", str(out), "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "reapkit", *words], stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as child:
        assert child.stderr is not None
        lock = out.with_name(out.name + ".lock")
        while not lock.exists():
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        first = child.stderr.readline()
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
    assert first == ANNOUNCED.format("the running wave is done") + "\n"
    assert child.returncode == 130 and "Traceback" not in rest and rest.endswith(RESUMES + "\n")
    assert list(tmp_path.iterdir()) == []
