"""Many files as a stranger might have made them, through every reader: only ReapkitError may come out, soon and within a gigabyte.

    python benchmarks/fuzz.py                       100,000 cases a target, as JSON on standard output
    python benchmarks/fuzz.py header plan           these targets alone
    python benchmarks/fuzz.py --engine atheris      guided by coverage (pip install atheris; Python 3.11 to 3.13)
    python benchmarks/fuzz.py --table FILE          the table of docs/reliability.md from the JSON of a run

The targets and the changes are those of tests/fuzzing.py. The engine `mutation` numbers its cases: the same numbers give the same cases.
The engine `atheris` lets libFuzzer choose which case to change next, by what new code it reached. Each target runs in a process of its
own, whose address space is limited; one that dies is counted as a crash with the case it died of, and followed by another. Exit code 3
if anything but a ReapkitError came out.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# A case that takes longer counts as one that never ends; slow disks and busy machines need a margin of a thousand.
SECONDS = 20
# What a case may take beside the process that has read its libraries and every whole file once. The largest cases have 600 kB.
HEADROOM = 1 << 30
KEPT_CASES = 3  # of each kind of failure
EVERY = 500  # cases between two writings of the record


class Hang(BaseException):
    """A case took too long."""


class Record:
    """What the cases of a target came to, written to a file now and then so that it outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases = self.accepted = self.peak = 0
        self.slowest = 0.0
        self.refused: collections.Counter[str] = collections.Counter()
        self.failures: dict[str, dict[str, Any]] = {}

    def run(self, target: Any, content: bytes) -> None:
        from reapkit.errors import ReapkitError

        self.cases += 1
        self.path.with_suffix(".case").write_bytes(content)
        begun = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.run(content)
            self.accepted += 1
        except ReapkitError as error:
            self.refused[type(error).__name__] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.fail(_place(error), content)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest = max(self.slowest, time.perf_counter() - begun)
        if self.cases % EVERY == 0:
            self.write()

    def fail(self, what: str, content: bytes) -> None:
        entry = self.failures.setdefault(what, {"count": 0, "cases": []})
        entry["count"] += 1
        if len(entry["cases"]) < KEPT_CASES:
            entry["cases"].append(base64.b64encode(content).decode())

    def write(self) -> None:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        described = {name: value for name, value in vars(self).items() if name != "path"}
        self.path.write_text(json.dumps(described | {"peak": kilobytes << 10, "refused": dict(self.refused)}))


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "reapkit" in Path(frame.filename).parts]
    where = f"{Path(frames[-1].filename).name} in {frames[-1].name}" if frames else "outside"
    return f"{type(error).__name__} at {where}"


def work(name: str, path: Path, start: int, stop: int, engine: str) -> None:
    """Run one target's cases in this process."""
    import fuzzing
    from reapkit.errors import ReapkitError

    scratch = Path(tempfile.mkdtemp(dir=_memory_folder()))
    record = Record(path)
    try:
        target = fuzzing.TARGETS[name](scratch)
        for seed in target.seeds:
            with contextlib.suppress(ReapkitError):  # rows with images are refused
                target.run(seed)
        signal.signal(signal.SIGALRM, _give_up)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if engine == "atheris":
            _guided(name, target, record, stop - start, mapped, scratch)
            return
        resource.setrlimit(resource.RLIMIT_AS, (mapped + HEADROOM, mapped + HEADROOM))
        for _, content in target.cases(start, stop):
            record.run(target, content)
    finally:
        record.write()
        shutil.rmtree(scratch, ignore_errors=True)


def _give_up(*_: Any) -> None:
    raise Hang


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _guided(name: str, target: Any, record: Record, count: int, mapped: int, scratch: Path) -> None:
    """Let libFuzzer choose: it keeps every case that reached new code of reapkit, and changes those further."""
    import atheris

    import reapkit

    for module in [module for name, module in sys.modules.items() if name.startswith("reapkit.")]:
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                for key, function in list(vars(value).items()):
                    if type(function).__name__ == "function" and not key.startswith("__"):
                        setattr(value, key, atheris.instrument_func(function))
            elif type(value).__name__ == "function" and value.__module__ == module.__name__:
                atheris.instrument_func(value)
    assert reapkit.__version__

    def change(content: bytes, limit: int, seed: int) -> bytes:
        chance = random.Random(seed)
        changed = target.change(content if len(content) > 8 else chance.choice(target.seeds), chance)
        return changed if len(changed) <= limit else content

    kept = scratch / "libfuzzer"
    kept.mkdir()
    for number, seed in enumerate(target.seeds):
        (kept / str(number)).write_bytes(seed)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * HEADROOM, mapped + 2 * HEADROOM))

    def one(content: bytes) -> None:
        record.run(target, content)
        if record.cases >= count:
            record.write()
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(0)  # libFuzzer would go on

    arguments = [
        sys.argv[0],
        str(kept),
        "-max_len=1000000",
        "-len_control=0",
        "-handle_alrm=0",
        "-timeout=0",
        "-rss_limit_mb=0",
        "-seed=1",
    ]
    atheris.Setup(arguments, one, custom_mutator=change)
    atheris.Fuzz()


def run(name: str, count: int, engine: str) -> dict[str, Any]:
    """Run one target to its end, in as many processes as it takes."""
    total: dict[str, Any] = {
        "cases": 0,
        "accepted": 0,
        "refused": {},
        "failures": {},
        "slowest_seconds": 0.0,
        "peak_bytes": 0,
    }
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        while total["cases"] < count:
            left = (str(total["cases"]), str(count))
            command = [sys.executable, __file__, "--work", name, str(path), *left, "--engine", engine]
            ended = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
            )
            if ended.returncode > 0 or not path.exists():  # a signal's number would be negative
                sys.exit(f"the benchmark itself failed on {name}: {ended.stderr[-2000:]}")
            part = json.loads(path.read_text())
            path.unlink()
            if ended.returncode:
                # The record is up to EVERY cases old: those before the one that it died of are not counted.
                case = base64.b64encode(path.with_suffix(".case").read_bytes()).decode()
                part["failures"][f"died with {ended.returncode}"] = {"count": 1, "cases": [case]}
                part["cases"] += EVERY - part["cases"] % EVERY
            total["cases"] += part["cases"]
            total["accepted"] += part["accepted"]
            for kind, number in part["refused"].items():
                total["refused"][kind] = total["refused"].get(kind, 0) + number
            for kind, entry in part["failures"].items():
                known = total["failures"].setdefault(kind, {"count": 0, "cases": []})
                known["count"] += entry["count"]
                known["cases"] = (known["cases"] + entry["cases"])[:KEPT_CASES]
            total["slowest_seconds"] = max(total["slowest_seconds"], round(part["slowest"], 3))
            total["peak_bytes"] = max(total["peak_bytes"], part["peak"])
    total["crashes"] = sum(entry["count"] for entry in total["failures"].values())
    return total | {"seconds": round(time.perf_counter() - begun, 1), "engine": engine}


def table(results: dict[str, Any]) -> str:
    """A run as the rows of docs/reliability.md."""
    lines = [
        "| file | engine | cases | read | refused | anything else | slowest | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        refused = sum(result["refused"].values())
        lines.append(
            f"| {name} | {result['engine']} | {result['cases']:,} | {result['accepted']:,} | {refused:,} | {result['crashes']} | "
            f"{result['slowest_seconds']:.2f} s | {result['peak_bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    import fuzzing

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(fuzzing.TARGETS)}; all by default")
    parser.add_argument("--cases", type=int, default=100_000, help="of each target")
    parser.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=Path, help="file to write besides; targets that it holds already are kept"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print a table of what an earlier run wrote, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return
    if arguments.work:
        name, path, start, stop = arguments.work
        work(name, Path(path), int(start), int(stop), arguments.engine)
        return
    results: dict[str, Any] = {}
    if arguments.output is not None and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    for name in arguments.targets or fuzzing.TARGETS:
        results[name] = result = run(name, arguments.cases, arguments.engine)
        print(
            f"{name}: {result['cases']:,} cases in {result['seconds']} s, {result['crashes']} crashes, "
            f"slowest {result['slowest_seconds']} s, {result['peak_bytes'] / 1e6:.0f} MB",
            file=sys.stderr,
        )
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if any(result["crashes"] for result in results.values()):
        sys.exit(3)


if __name__ == "__main__":
    main()
