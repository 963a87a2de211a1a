"""What does observing cost on two CPU cores, and how soon do the commands that need no model start?

    python benchmarks/small_machine.py [--rows 96] [--rounds 5] [--json FILE]

Runs the bundled model over the same micro-batches: transformers' own forward of the whole model (`grouped_mm`, in memory), and observing it
from disk, each in processes of its own, in turn, since how memory is allocated is a process's setting, and what one leaves behind helps the
other. Prints the ratio of the medians, which must be at most 1.2. Then starts `reapkit --help` and `reapkit plan`
several times: at most 0.3 s and 1 s.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODEL = Path(__file__).parents[1] / "models/m2-nano"
LIMITS = {"observe / forward": 1.2, "reapkit --help": 0.3, "reapkit plan": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments.rows, arguments.rounds)))
        return 0
    times: dict[str, list[float]] = {"forward": [], "observe": []}
    usage: dict[str, list[Any]] = {"forward": [], "observe": []}
    for _ in range(2):
        for name in times:
            options = f"--rows {arguments.rows} --rounds {arguments.rounds} --child {name}".split()
            command = [sys.executable, __file__, *options]
            reply = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds, used = json.loads(reply.splitlines()[-1])
            times[name] += seconds
            usage[name] += used
    plain, observed = (stats.median(times[name]) for name in ("forward", "observe"))
    result = observation(arguments.rows).run()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "statistics.safetensors"
        result.save(path)
        starts = {
            "reapkit --help": started(arguments.rounds, "--help"),
            "reapkit plan": started(
                arguments.rounds, "plan", path, "--ratio", "0.25", "-o", Path(scratch) / "plan.json", "-q"
            ),
        }
    figures = {"observe / forward": observed / plain} | {name: stats.median(values) for name, values in starts.items()}
    print(f"{result.num_tokens:,} tokens: forward {plain:.2f} s, observed {observed:.2f} s")
    for name, rounds in usage.items():
        user, system, faults = np.median(rounds, axis=0)
        print(
            f"{name:20} {user:6.2f} s of processor time, {system:.2f} s of the system for it, {faults:,.0f} page faults"
        )
    for name, value in figures.items():
        print(f"{name:20} {value:6.2f}   at most {LIMITS[name]}: {'yes' if value <= LIMITS[name] else 'NO'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"figures": figures, "times": times, "starts": starts}, indent=2) + "\n")
    return 0 if all(value <= LIMITS[name] for name, value in figures.items()) else 1


def observation(rows: int) -> Any:
    from reapkit.observation import Observation, Run

    run = Run(device="cpu", dtype="float32")
    return Observation(MODEL, [f"{MODEL / 'data/calibration.jsonl'}:{rows}"], run=run, max_length=2048, seed=0)


def forward(rows: int, rounds: int) -> tuple[list[float], list[list[float]]]:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    stored = json.loads((MODEL / "config.json").read_text())["quantization_config"]
    dequantized = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=stored["modules_to_not_convert"])
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, experts_implementation="grouped_mm", quantization_config=dequantized
    )
    model = model.float().eval()
    batches = observation(rows).batches

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.model(input_ids=torch.from_numpy(batch.input_ids_BT), use_cache=False)

    return measured(run, rounds)


def observe(rows: int, rounds: int) -> tuple[list[float], list[list[float]]]:
    return measured(observation(rows).run, rounds)


CHILDREN = {"forward": forward, "observe": observe}


def measured(run: Callable[[], object], rounds: int) -> tuple[list[float], list[list[float]]]:
    """Seconds of each round, and its user and system time in seconds and its page faults; a round before them is not counted."""
    torch.set_num_threads(2)
    run()
    times, usage = [], []
    for _ in range(rounds):
        begun, used = time.perf_counter(), processor_time()
        run()
        times.append(time.perf_counter() - begun)
        usage.append(list(processor_time() - used))
    return times, usage


def processor_time() -> Any:
    """This process's user and system time in seconds, and its page faults."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([usage.ru_utime, usage.ru_stime, usage.ru_minflt])


def started(rounds: int, *arguments: object) -> list[float]:
    """Seconds of a command from its start to its end, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "reapkit", *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begun)
    return times[1:]


if __name__ == "__main__":
    sys.exit(main())
