"""Killed, torn or refused at every single system call that changes a file: nothing is lost, nothing looks finished that is not.

`make test` takes an even sample of the calls, `make torture` every one (REAPKIT_TORTURE).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import disturbances
from disturbances import ERRORS, MODEL, NEEDS_COMPILER, Disturbance, Ended, contents
from reapkit import outputs, shards, verify
from reapkit.checkpoint import UNFINISHED_NAME
from reapkit.outputs import PARTIAL

ALL = "REAPKIT_TORTURE" in os.environ
PARTS = 8 if ALL else 1  # so that two processes share the work
pytestmark = NEEDS_COMPILER


@dataclass
class Case:
    """A verb with what its undisturbed run does.

    Attributes:
        verb: its name.
        words: its arguments; OUT stands for what it writes.
        calls: what it does to files below the folder of its output, in order.
        expected: what it leaves there.
        finished: by what a disturbed run left, whether the same command finishes it; a run depends on nothing else.
    """

    verb: str
    words: list[str]
    calls: list[tuple[str, str]]
    expected: dict[str, bytes]
    finished: dict[str, bool] = field(default_factory=dict)

    def command(self, folder: Path) -> list[str]:
        return [word.replace("OUT", str(folder)) for word in self.words]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every verb that writes, each once undisturbed; a verb's output lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = disturbances.small_text(folder / "text.jsonl", 6)
    observing = disturbances.compressing(Path("OUT"), data)
    options = observing[observing.index("--device") :]
    text = ["--data", str(data), *options]
    statistics, plan = folder / "observe/s.safetensors", folder / "plan/p.json"
    words = {
        "observe": ["observe", str(MODEL), *text, "-o", "OUT/s.safetensors"],
        "plan": ["plan", str(statistics), "--ratio", "0.25", "-o", "OUT/p.json"],
        "prune": ["prune", str(MODEL), str(plan), "-o", "OUT"],
        "compress": observing,
    }
    cases = {}
    for verb, arguments in words.items():
        case = Case(verb, arguments, [], {})
        case.calls = disturbances.calls(case.command(folder / verb), folder / f"{verb}.said", folder / verb)
        case.expected = left_by(case, folder / verb)
        cases[verb] = case
    return cases


def share_of(places: Sequence[int], sample: int, part: int) -> Sequence[int]:
    """All places, or an even sample of them with the first and the last, and of these a part."""
    if not ALL:
        step = max(1, (len(places) - 1) / max(1, sample - 1))
        places = sorted({places[round(index * step)] for index in range(min(sample, len(places)))})
    return places[part::PARTS]


def left_by(case: Case, out: Path) -> dict[str, bytes]:
    """What a finished command left. Looking at a pruned folder's honesty verifies it, which records digests: so all are verified."""
    if case.verb == "prune":
        assert verify(out, source=MODEL).ok
    return contents(out)


def go_on(case: Case, out: Path, said: Path) -> None:
    """The same command finishes what a disturbed run left, to the same bytes."""
    left = {name: hashlib.sha256(content).hexdigest() for name, content in contents(out).items() if "lock" not in name}
    locks = sorted(path.name for path in out.rglob("*lock"))
    state = f"{out.exists()} {sorted(left.items())} {locks}"
    if state not in case.finished:
        ended = disturbances.run(case.command(out), said)
        assert ended.code == 0, ended.said
        assert left_by(case, out) == case.expected
        case.finished[state] = True


@pytest.mark.parametrize("part", range(PARTS))
def test_compress_killed_at_every_call_is_honest_and_goes_on_to_the_same_bytes(
    cases: dict[str, Case], tmp_path: Path, part: int
) -> None:
    case, states = cases["compress"], Counter[str]()
    writes = [number for number, (call, _) in enumerate(case.calls, 1) if call in ("write", "copy")]
    places = [("kill", number) for number in share_of(range(1, len(case.calls) + 1), 6, part)]
    places += [("tear", number) for number in share_of(writes, 2, part)]
    for kind, number in places:
        out = tmp_path / f"{kind}-{number}"
        ended = disturbances.run(case.command(out), tmp_path / "said", Disturbance(kind, out, number))
        assert ended.code == -signal.SIGKILL, (kind, number, ended)
        states[disturbances.require_honest(out)] += 1
        go_on(case, out, tmp_path / "said")
        shutil.rmtree(out, ignore_errors=True)
    disturbances.record(
        f"kills at calls, part {part}",
        {"test": "kills at calls", "calls": len(case.calls), "kills": len(places), **states},
    )


def require_one_sentence(ended: Ended, reason: int) -> None:
    assert ended.code == 1, ended
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in ended.said, ended.said
    assert os.strerror(reason) in errors[0], errors


def require_nothing_partial(case: Case, out: Path) -> None:
    """What has its name is whole: as the undisturbed run left it."""
    for name, content in contents(out).items():
        is_own = name.endswith((PARTIAL, ".unfinished", "lock")) or name == UNFINISHED_NAME
        without_digests = name == "reapkit.json" and b'"digests": null' in content
        assert is_own or without_digests or content == case.expected[name], name


def test_at_every_call_the_disk_holds_what_a_power_cut_must_not_take(cases: dict[str, Case]) -> None:
    """The order of the calls: bytes before their name, names before the manifest, the manifest before the marker goes."""
    marker, manifest = f"/{UNFINISHED_NAME}", "/reapkit.json"
    unsynced: set[str] = set()  # files with bytes that only memory holds
    unnamed: dict[str, str] = {}  # by name, what a folder holds in memory only
    renamed: list[str] = []
    finished = 0
    for call, path in cases["compress"].calls:
        if path.endswith("lock"):
            continue  # which a power cut may take
        folder = path.rpartition("/")[0]
        if call in ("open", "write", "copy", "truncate"):
            assert path.endswith(PARTIAL), "nothing is written under a final name"
            assert not path.startswith("/model") or (marker in renamed and marker not in unnamed)
            unsynced.add(path)
        elif call == "fsync":
            unsynced.discard(path)
            unnamed = {name: where for name, where in unnamed.items() if where != path}
        elif call == "mkdir" and path:  # the output's own folder: the test below
            unnamed[path] = folder
        elif call == "rename":
            assert path + PARTIAL not in unsynced
            unnamed[path] = folder
            renamed.append(path)
        elif call == "unlink" and path == marker:
            assert renamed[-1] == manifest
            assert not unsynced and not unnamed, "all is on the disk"
            finished = len(renamed)
            unnamed["the marker's removal"] = folder
    assert finished == len({*renamed}) and renamed[finished:] == [manifest], "verifying adds the digests"
    assert not unsynced and not unnamed


def test_folders_that_are_made_are_on_the_disk_with_those_above_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        outputs.os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink()))
    )
    outputs.make_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir() and synced == [str(tmp_path), str(tmp_path / "a")]
    outputs.make_folder(tmp_path / "a/b")
    assert len(synced) == 2, "it was there"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def ask_for_no_space() -> None:
    """As if the disk filled up only after the space was checked."""
    shards._require_space = lambda *_: None  # type: ignore[assignment]


def test_a_real_disk_that_is_full_or_read_only_loses_nothing(
    cases: dict[str, Case], tmp_path: Path, disk: Path
) -> None:
    case = cases["compress"]
    out, said = disk / "out", tmp_path / "said"
    ended = disturbances.run(case.command(out), said)
    assert ended.code == 1 and f"error: {out} needs 0.026 GB and its disk has 0.02" in ended.said, ended
    assert not out.exists(), "that was foreseen"
    ended = disturbances.run(case.command(out), said, prepare=ask_for_no_space)
    require_one_sentence(ended, errno.ENOSPC)
    require_nothing_partial(case, out)
    assert disturbances.require_honest(out) == "unfinished"
    remount(disk, "size=64m,ro")
    require_one_sentence(disturbances.run(case.command(out), said), errno.EROFS)
    remount(disk, "rw")
    ended = disturbances.run(case.command(out), said)
    assert ended.code == 0 and "observe" not in ended.said, ended
    assert contents(out) == case.expected


@pytest.mark.parametrize("verb", ["inspect", "observe", "prune", "verify"])
def test_a_disk_that_no_longer_gives_the_checkpoint_is_one_sentence_and_names_the_shard(
    cases: dict[str, Case], tmp_path: Path, verb: str
) -> None:
    source, out, said = tmp_path / "source", tmp_path / "out", tmp_path / "said"
    shutil.copytree(MODEL, source, ignore=shutil.ignore_patterns("data"))
    plan = next(Path(word) for word in cases["prune"].words if word.endswith("p.json"))
    if verb == "verify":
        assert disturbances.run(["prune", str(source), str(plan), "-o", str(out)], said).code == 0
    words = {
        "inspect": ["inspect", str(source)],
        "observe": [word.replace(str(MODEL), str(source)) for word in cases["observe"].command(out)],
        "prune": ["prune", str(source), str(plan), "-o", str(out)],
        "verify": ["verify", str(out), "--source", str(source)],
    }[verb]
    reads = disturbances.calls(words, said, source, reads=True)
    if verb != "verify":
        shutil.rmtree(out, ignore_errors=True)
    # The last opening of a shard and what is read first from it are those past the page cache, where the disk allows that.
    last = {(path, call == "open"): number for number, (call, path) in enumerate(reads, 1)}
    first = [number + 1 for (path, is_open), number in last.items() if is_open and ".safetensors" in path]
    places = range(1, len(reads) + 1) if ALL else sorted({*last.values(), *first})
    for number in places:
        call, path = reads[number - 1]
        ended = disturbances.run(words, said, Disturbance("fail on", source, number, errno.EIO, reads=True))
        print(f"{verb}: {call} {path} at {number}: {ended}")  # shown on a failure
        if ended.code == 0:
            assert path == "/README.md", "the card does without what the source says of itself"
        else:
            require_one_sentence(ended, errno.EIO)
            # Several shards are read at once, so it may be another's; transformers does not say which of its files it was.
            assert ".safetensors" not in path or re.search(
                r"error: model\S*\.safetensors\S* cannot be read", ended.said
            )
        if verb in ("observe", "prune"):
            shutil.rmtree(out, ignore_errors=True)
    disturbances.record(f"unreadable {verb}", {"test": "reads refused", "refused": len(places)})


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("verb", ["observe", "plan", "prune", "compress"])
def test_a_disk_that_refuses_any_call_is_one_sentence_and_loses_nothing(
    cases: dict[str, Case], tmp_path: Path, verb: str, part: int
) -> None:
    case, counts = cases[verb], Counter[str]()
    sample = {"observe": 3, "plan": 3, "prune": 8, "compress": 4}[verb]
    kinds = [(kind, error) for kind in ("fail once", "fail on") for error in ERRORS]
    for number in share_of(range(1, len(case.calls) + 1), sample, part):
        call, path = case.calls[number - 1]
        # Every error at every call; copies of byte ranges, `compress`, whose calls are those of the others, and samples take one in turn.
        for kind, error in kinds if ALL and verb != "compress" and call != "copy" else [kinds[number % len(kinds)]]:
            out = tmp_path / f"{number}-{counts.total()}"
            ended = disturbances.run(case.command(out), tmp_path / "said", Disturbance(kind, out, number, error))
            print(
                f"{verb}: {kind}, {os.strerror(error)} at call {number}, {call} {path}: {ended}"
            )  # shown on a failure
            if ended.code == 0:
                # A folder that is there need not be made, and a full disk lets files go.
                assert call in ("mkdir", "unlink")
                assert left_by(case, out) == case.expected
            else:
                require_one_sentence(ended, error)
                require_nothing_partial(case, out)
                if verb in ("prune", "compress"):
                    disturbances.require_honest(out)
                go_on(case, out, tmp_path / "said")
            counts["refused" if ended.code else "did without"] += 1
            shutil.rmtree(out, ignore_errors=True)
    disturbances.record(
        f"disk faults in {verb}, part {part}", {"test": f"disk faults in {verb}", "calls": len(case.calls), **counts}
    )
