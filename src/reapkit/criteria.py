"""Saliency: how much an expert contributes, as pure functions of one layer's sums. Low is pruned.

Shape suffixes: E = experts; S = rows of sums. An expert that no token was routed to scores 0 under every criterion but `random`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reapkit.errors import UsageError, did_you_mean
from reapkit.statistics import Array, LayerStatistics

Criterion = Callable[[LayerStatistics], Array]


def _mean(total_E: Array, count_E: Array) -> Array:
    return np.divide(total_E, count_E, out=np.zeros_like(total_E), where=count_E > 0)


def reap(layer: LayerStatistics) -> Array:
    """Mean of gate weight x output norm over the tokens routed to the expert (Lasby et al., arXiv 2510.13999)."""
    return _mean(layer.gated_norm_SE.sum(0), layer.count_SE.sum(0))


def frequency(layer: LayerStatistics) -> Array:
    """Number of tokens routed to the expert."""
    total_E: Array = layer.count_SE.sum(0)
    return total_E


def ean_sum(layer: LayerStatistics) -> Array:
    """Sum of output norms over the tokens routed to the expert (expert activation norm, Jaiswal et al. 2025)."""
    total_E: Array = layer.norm_SE.sum(0)
    return total_E


def ean_mean(layer: LayerStatistics) -> Array:
    """Mean output norm over the tokens routed to the expert."""
    return _mean(layer.norm_SE.sum(0), layer.count_SE.sum(0))


def msan(layer: LayerStatistics) -> Array:
    """Mean squared output norm over the tokens routed to the expert (arXiv 2606.15716)."""
    return _mean(layer.norm_sq_SE.sum(0), layer.count_SE.sum(0))


def man(layer: LayerStatistics) -> Array:
    """Mean output norm over the tokens routed to the expert (arXiv 2606.15716); the same as ean-mean."""
    return ean_mean(layer)


def gate_sum(layer: LayerStatistics) -> Array:
    """Sum of gate weights: a soft frequency."""
    total_E: Array = layer.gate_SE.sum(0)
    return total_E


def gated_norm_sum(layer: LayerStatistics) -> Array:
    """Sum of gate weight x output norm: REAP without its division by the number of tokens."""
    total_E: Array = layer.gated_norm_SE.sum(0)
    return total_E


CRITERIA: Mapping[str, Criterion] = {
    "reap": reap,
    "frequency": frequency,
    "ean-sum": ean_sum,
    "ean-mean": ean_mean,
    "gate-sum": gate_sum,
    "gated-norm-sum": gated_norm_sum,
    "man": man,
    "msan": msan,
}
RANDOM = "random"
REROUTE = "reroute"
# Those that are no function of sums, and what they need in place of statistics or beside them.
OTHERS: Mapping[str, str] = {
    REROUTE: "Re-routed error: backward elimination of what changes layers' outputs least; needs observe --reroute-tokens.",
    RANDOM: "Uniform at random, by seed; needs no statistics.",
}


@dataclass(frozen=True)
class Scores:
    """Scores of every MoE layer under one criterion.

    Attributes:
        criterion: its name.
        score_E: float64 [E] by layer number; low is pruned.
    """

    criterion: str
    score_E: Mapping[int, Array]


def score(layers: Mapping[int, LayerStatistics], criterion: str) -> Scores:
    """Score every layer's experts.

    Raises:
        UsageError: an unknown criterion.
    """
    check(criterion)
    if criterion in OTHERS:
        raise UsageError(f"the criterion {criterion!r} is no function of statistics alone")
    return Scores(criterion, {index: CRITERIA[criterion](layer) for index, layer in layers.items()})


def score_at_random(layers: Sequence[int], num_experts: int, *, seed: int) -> Scores:
    """Uniform scores that depend on the seed and on the layer's number alone."""
    return Scores(RANDOM, {index: np.random.default_rng([seed, index]).random(num_experts) for index in layers})


def check(criterion: str) -> None:
    """Raise UsageError for an unknown criterion, with the nearest known name."""
    if criterion not in CRITERIA and criterion not in OTHERS:
        raise UsageError(f"there is no criterion {criterion!r}", hint=did_you_mean(criterion, [*CRITERIA, *OTHERS]))
