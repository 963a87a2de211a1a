"""Do the saliencies, and the choice of experts, survive when experts are computed in FP8?

    python benchmarks/fp8_saliency.py [FOLDER] [--data FILE] [--json FILE]       m2-nano and its calibration text by default

Observes an FP8 checkpoint in float32, in bfloat16 and in float8 (experts in FP8 with inputs rounded to it, as engines serve them), and
compares with bfloat16, per layer: the rank correlation (Spearman) of REAP's saliencies, and the Jaccard index of the kept sets at several
ratios. What halves of the same calibration text agree in is the measure: a difference below that of another text does not matter.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from reapkit import criteria, plans
from reapkit.evidence import agreement_of_halves, jaccard
from reapkit.observation import FP8, Run, observe
from reapkit.statistics import Statistics

M2_NANO = Path(__file__).resolve().parents[1] / "models/m2-nano"
RATIOS = ("0.125", "0.25", "0.30", "0.375", "0.50")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=M2_NANO)
    parser.add_argument("--data", help="calibration text; m2-nano's own by default")
    parser.add_argument("--without", action="append", default=[], metavar="DTYPE", help="one that is not to be run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    data = arguments.data or str(M2_NANO / "data/calibration.jsonl")
    dtypes = [dtype for dtype in ("float32", "bfloat16", FP8) if dtype not in arguments.without]
    found = {
        dtype: observe(arguments.folder, [data], run=Run(device="cuda", dtype=dtype), max_length=2048)
        for dtype in dtypes
    }
    figures = {dtype: compared(found[dtype], found["bfloat16"]) for dtype in dtypes if dtype != "bfloat16"}
    figures["halves of the text in bfloat16"] = {"kept": {ratio: halves(found["bfloat16"], ratio) for ratio in RATIOS}}
    for name, figure in figures.items():
        ranks = figure.get("rank_correlation")
        print(
            f"{name} against bfloat16" + (f": rank correlation {min(ranks):.5f} to {max(ranks):.5f}" if ranks else "")
        )
        for ratio, value in figure["kept"].items():
            print(f"    {float(ratio):6.1%} removed: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def compared(one: Statistics, other: Statistics) -> dict[str, Any]:
    """Rank correlations per layer; per ratio the mean Jaccard index, the experts that differ, and how far these lay from the border."""
    scores = [criteria.score(part.layers, "reap").score_E for part in (one, other)]
    ranks = [float(spearmanr(scores[0][layer], scores[1][layer]).statistic) for layer in scores[0]]
    kept: dict[str, Any] = {}
    for ratio in RATIOS:
        count = plans.num_kept(one.num_experts, ratio=ratio)
        sets = [plans.select(criteria.score(part.layers, "reap"), keep=count) for part in (one, other)]
        apart = [
            float(abs(scores[1][layer][expert] / np.sort(scores[1][layer])[-count] - 1))
            for layer in sets[0]
            for expert in set(sets[0][layer]) ^ set(sets[1][layer])
        ]
        kept[ratio] = {
            "jaccard": float(np.mean([jaccard(sets[0][layer], sets[1][layer]) for layer in sets[0]])),
            "experts_that_differ": len(apart) // 2,
            "of": count * len(sets[0]),
            "farthest_from_the_border": max(apart, default=0.0),
        }
    return {"rank_correlation": ranks, "kept": kept}


def halves(statistics: Statistics, ratio: str) -> dict[str, float]:
    return {"jaccard": agreement_of_halves(statistics, keep=plans.num_kept(statistics.num_experts, ratio=ratio))}


if __name__ == "__main__":
    sys.exit(main())
