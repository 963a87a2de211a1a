"""Saliency: how much an expert contributes, as pure functions of one layer's sums. Low is pruned.

Shape suffixes: E = experts; S = rows of sums; D = domains. Experts that no token was routed to score 0 under all criteria but `random`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reapkit import errors
from reapkit.errors import UsageError, did_you_mean
from reapkit.statistics import NUM_FOLDS, SUM_NAMES, Array, LayerStatistics

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
AIMER = "aimer"
EASY_EP = "easy-ep"
# Those that are no function of sums, and what they need in place of statistics or beside them.
OF_SAMPLE = (REROUTE, EASY_EP)
OTHERS: Mapping[str, str] = {
    REROUTE: "Re-routed error: backward elimination of what changes layers' outputs least; needs observe --reroute-tokens.",
    EASY_EP: "Sum of gate weight x output norm x how far the layer turns the token's state; needs observe --reroute-tokens.",
    AIMER: "Spread of the magnitudes of an expert's weights (arXiv 2603.18492); takes a checkpoint and needs no data.",
    RANDOM: "Uniform at random, by seed; needs no statistics.",
}

# What a choice may rest on besides the number that stays: by criterion, the options that it uses.
_OF_SUMS = frozenset({"blend", "protect", "evidence"})
_OF_A_SAMPLE = _OF_SUMS | {"reroute_tokens", "reroute_candidates"}
USED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(CRITERIA, _OF_SUMS),
    REROUTE: _OF_A_SAMPLE | {"weights"},
    EASY_EP: _OF_A_SAMPLE,
    AIMER: frozenset({"revision"}),
    RANDOM: frozenset({"seed", "revision", "protect", "evidence"}),
}
OPTIONS = frozenset().union(*USED.values())
# Those of them that mean something where a checkpoint is chosen from; on statistics, all but its revision.
ON_CHECKPOINTS, ON_STATISTICS = frozenset({"seed", "revision"}), OPTIONS - {"revision"}


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


def require_used(criterion: str, given: Iterable[str]) -> None:
    """Raise UsageError for an unknown criterion, and for an option of choosing (`OPTIONS`) that it does not use."""
    check(criterion)
    errors.require_used(OPTIONS.intersection(given), USED[criterion], f"--criterion {criterion}")


# ---- several domains


UNIFORM, WORST = "uniform", "max-min"


@dataclass(frozen=True)
class Blend:
    """How much each domain counts, whatever its share of the calibration.

    Attributes:
        share_D: of each domain; None for the blend that looks at the worst domain alone.
    """

    share_D: tuple[float, ...] | None

    @classmethod
    def parse(cls, text: str, domains: Sequence[str]) -> Blend:
        """`uniform`, `max-min`, or weights like `code=2,math=1`, in which domains that are not named count nothing.

        Raises:
            UsageError: neither, an unknown domain, or weights that are no positive numbers.
        """
        if text in (UNIFORM, WORST):
            return cls(None if text == WORST else (1 / len(domains),) * len(domains))
        shares = dict.fromkeys(domains, 0.0)
        for part in text.split(","):
            name, is_weighted, value = part.partition("=")
            if not is_weighted:
                raise UsageError(
                    f"--blend {text!r} is neither {UNIFORM}, {WORST} nor weights", hint="like code=2,math=1"
                )
            if name.strip() not in shares:
                raise UsageError(
                    f"--blend names the domain {name.strip()!r}, which was not observed",
                    hint=did_you_mean(name, domains),
                )
            try:
                shares[name.strip()] = float(value)
            except ValueError:
                raise UsageError(
                    f"--blend gives {name!r} the weight {value!r}, which is not a number", hint="like code=2,math=1"
                ) from None
        total = sum(shares.values())
        if not np.isfinite(total) or total <= 0 or min(shares.values()) < 0:
            raise UsageError(f"the weights of --blend {text!r} are not positive", hint="like code=2,math=1")
        return cls(tuple(share / total for share in shares.values()))


def blend_sums(layer: LayerStatistics, share_D: Sequence[float]) -> LayerStatistics:
    """A layer's sums as if each domain had had that share of the tokens."""
    tokens_D = layer.tokens_S.reshape(-1, NUM_FOLDS).sum(1)
    factor_D = np.divide(share_D, tokens_D, out=np.zeros_like(tokens_D), where=tokens_D > 0) * tokens_D.sum()
    factor_S = np.repeat(factor_D, NUM_FOLDS)
    sums = {name: getattr(layer, name) * factor_S[:, None] for name in SUM_NAMES}
    return replace(layer, tokens_S=layer.tokens_S * factor_S, **sums)


def of_domain(layer: LayerStatistics, domain: int) -> LayerStatistics:
    """A layer's sums over one domain."""
    rows = slice(domain * NUM_FOLDS, (domain + 1) * NUM_FOLDS)
    sums = {name: getattr(layer, name)[rows] for name in SUM_NAMES}
    return replace(layer, tokens_S=layer.tokens_S[rows], **sums)


def of_folds(layer: LayerStatistics, folds: Sequence[int]) -> LayerStatistics:
    """A layer's sums over documents of some folds; the rows of the others are zero."""
    is_in_S = np.isin(np.arange(len(layer.tokens_S)) % NUM_FOLDS, folds)
    sums = {name: getattr(layer, name) * is_in_S[:, None] for name in SUM_NAMES}
    return replace(layer, tokens_S=layer.tokens_S * is_in_S, **sums)


def rank_by_worst(score_DE: Array, *, num_groups: int = 1) -> Array:
    """A score under which experts go one by one, each time the one that leaves most to the domain that is left with least.

    What a domain is left with is the share of its own total score that the kept experts have. Of ties the highest number goes.

    Args:
        score_DE: scores of the experts in each domain alone; higher is kept.
        num_groups: router groups, which lose experts in turn.
    """
    total_D = score_DE.sum(1, keepdims=True)
    share_DE = np.divide(score_DE, total_D, out=np.zeros_like(score_DE), where=total_D > 0)
    num_experts = share_DE.shape[1]
    lost_D = np.zeros(len(share_DE))
    rank_E = np.full(num_experts, -1.0)
    is_open = np.ones(num_groups, dtype=bool)
    for step in range(num_experts):
        worst_E = (lost_D[:, None] + share_DE).max(0)
        worst_E[(rank_E >= 0) | ~np.repeat(is_open, num_experts // num_groups)] = np.inf
        gone = num_experts - 1 - int(np.argmin(worst_E[::-1]))
        rank_E[gone] = step
        lost_D += share_DE[:, gone]
        is_open[gone // (num_experts // num_groups)] = False
        if not is_open.any():
            is_open[:] = True
    return rank_E


# ---- super experts

# Su et al., arXiv 2507.23279: above this percentile of all experts' largest outputs, and above this part of the largest of all.
SUPER_PERCENTILE = 99.5
SUPER_PART = 0.1


def super_experts(layers: Mapping[int, LayerStatistics]) -> dict[int, tuple[int, ...]]:
    """By layer, the few experts whose outputs are extreme; removing one is said to break a model.

    Su et al. (arXiv 2507.23279) take the largest element of an expert's output, and look only at layers in which massive activations
    form; here it is the largest norm, which such an element makes up, and all layers are looked at.
    """
    norms = np.concatenate([layer.max_norm_E for layer in layers.values()])
    least = max(float(np.percentile(norms, SUPER_PERCENTILE)), SUPER_PART * float(norms.max()))
    found = {index: tuple(int(e) for e in np.flatnonzero(layer.max_norm_E > least)) for index, layer in layers.items()}
    return {index: experts for index, experts in found.items() if experts}
