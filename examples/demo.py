"""The demonstration: compress the bundled model by 25 % and by 30 %, verify, compare, score, and print one table.

    python examples/demo.py --out out

Every step is a command of reapkit, printed before it runs. Calibration and held-out text are disjoint halves of `models/m2-nano/data`.
The table's numbers are left in `OUT/demo.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("models/m2-nano")
CALIBRATION = MODEL / "data/calibration.jsonl"
HELDOUT = MODEL / "data/heldout.jsonl"
RATIOS = ("0.25", "0.30")

sys.path.insert(0, str(ROOT / "examples/m2_nano"))


def reapkit(*arguments: str | Path) -> dict[str, Any]:
    """Run one command and return what it printed as JSON."""
    words = [str(argument) for argument in arguments]
    print("$ reapkit", *words, flush=True)
    command = [sys.executable, "-m", "reapkit", *words, "--json"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"reapkit {words[0]} ended with exit code {result.returncode}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def demonstrate(out: Path, limit: int | None) -> dict[str, Any]:
    """Run every step; the figures of the table, one entry per model."""
    from score import read_rows, score

    rows = read_rows(ROOT / HELDOUT)
    inventory = reapkit("inspect", MODEL)
    models: dict[str, Any] = {
        "original": {
            "experts": inventory["num_experts"],
            "parameters": inventory["parameters"],
            "bytes": inventory["nbytes"],
            "folder": ROOT / MODEL,
        }
    }
    for ratio in RATIOS:
        folder = out / f"m2-nano-reap-{ratio}"
        shutil.rmtree(folder, ignore_errors=True)
        result = reapkit("compress", MODEL, "--data", CALIBRATION, "--ratio", ratio, "--output", folder)
        reapkit("verify", folder)
        fidelity = reapkit("compare", MODEL, folder, "--data", HELDOUT)
        after = result["manifest"]["after"]
        models[f"-{100 * float(ratio):.0f} %"] = {
            "experts": after["num_experts"],
            "parameters": after["parameters"],
            "bytes": after["bytes"],
            "kl": fidelity["overall"]["kl"],
            "top1": fidelity["overall"]["top1"],
            "folder": folder,
        }
    for name, model in models.items():
        print(f"scoring {name}", flush=True)
        model["exact_match"] = score(model.pop("folder"), rows, limit=limit)
    return models


def print_table(models: dict[str, Any]) -> None:
    """One column per model."""
    table = Table("m2-nano", *models, box=None, pad_edge=False)

    def row(label: str, cells: list[str]) -> None:
        table.add_row(label, *cells)

    row("experts per layer", [str(model["experts"]) for model in models.values()])
    row("parameters", [f"{model['parameters']:,}" for model in models.values()])
    row("bytes of tensors", [f"{model['bytes']:,}" for model in models.values()])
    row("KL, nats/token", [_figure(model.get("kl"), 4) for model in models.values()])
    row("top-1 agreement", [_figure(model.get("top1"), 4) for model in models.values()])
    for domain in models["original"]["exact_match"]:
        row(f"exact match, {domain}", [_figure(model["exact_match"][domain], 3) for model in models.values()])
    Console(width=120).print(table)


def _figure(figure: dict[str, float] | None, digits: int) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.{digits}f} +- {figure['standard_error']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--limit", type=int, help="prompts per domain to score; all by default")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    models = demonstrate(out, arguments.limit)
    (out / "demo.json").write_text(json.dumps(models, indent=2) + "\n")
    print_table(models)
    print(f"figures: {arguments.out / 'demo.json'}")


if __name__ == "__main__":
    main()
