"""Time and memory of choosing by re-routed error in a layer of MiniMax-M2's size, on made-up tokens: `elimination.py [--keep 128]`.

256 experts, 8 per token, 32,768 sampled tokens with 16 candidates each, or with DeepSeek-V3's 8 groups. The outputs are random; experts
are as unevenly popular as a normal spread of their logits makes them, which decides how many tokens each step touches.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from reapkit.elimination import RoutedSample, eliminate, token_weights
from reapkit.selection import Rule

TOKENS, EXPERTS, TOP_K, CANDIDATES, WIDTH = 32_768, 256, 8, 16, 24


def make_layer(rule: Rule, *, spread: float, seed: int = 0) -> RoutedSample:
    """Tokens whose choices depend on an expert's popularity, of which `spread` is the deviation against that of single tokens."""
    rng = np.random.default_rng(seed)
    logits_TE = rng.standard_normal((TOKENS, EXPERTS), dtype=np.float32) + spread * rng.standard_normal(
        EXPERTS, dtype=np.float32
    )
    expert_TC = np.argsort(-logits_TE, axis=1)[:, :CANDIDATES].astype(np.int16)
    score_TE = 1 / (1 + np.exp(-logits_TE))
    outputs = rng.standard_normal((TOKENS, CANDIDATES, WIDTH), dtype=np.float32)
    rows, columns = np.triu_indices(CANDIDATES)
    gram_TU = (outputs @ outputs.transpose(0, 2, 1))[:, rows, columns]
    ones = np.ones(TOKENS, dtype=np.float32)
    score_TC = np.take_along_axis(score_TE, expert_TC.astype(np.int64), 1)
    choice_TE = score_TE if rule.num_groups > 1 else None
    return RoutedSample(
        rule, expert_TC, score_TC, gram_TU, ones, ones, np.zeros(TOKENS, dtype=np.int32), ones, choice_TE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=int, default=128)
    keep = parser.parse_args().keep
    rules = {
        "MiniMax-M2": Rule(EXPERTS, TOP_K, "sigmoid", True, 1.0, 0.0),
        "DeepSeek-V3": Rule(EXPERTS, TOP_K, "sigmoid", True, 2.5, 1e-20, num_groups=8, topk_groups=4),
    }
    for name, rule in rules.items():
        for spread in (0.0, 0.5):
            layer = make_layer(rule, spread=spread)
            start, cpu = time.perf_counter(), time.process_time()
            found = eliminate(layer, token_weights(layer, "residual"), keep=keep)
            result = {
                "router": name,
                "spread": spread,
                "removed": len(found.order),
                "seconds": round(time.perf_counter() - start, 2),
                "processor_seconds": round(time.process_time() - cpu, 2),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "out_of_candidates": {
                    f"{(step + 1) / EXPERTS:.3f}": round(found.short[step], 5)
                    for step in (31, 63, 76, 95, 127)
                    if step < len(found.short)
                },
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
