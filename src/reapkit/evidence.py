"""How far a choice of experts can be trusted, before anything is cut: agreement between parts of the calibration, coverage, errors.

Shape suffixes: E = experts; D = domains; S = rows of sums.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reapkit import criteria, outputs
from reapkit.criteria import Scores, of_domain
from reapkit.elimination import Array, RoutedSample, eliminate, rerouted_error, token_weights
from reapkit.plans import Choice, num_kept, score_blended, score_sampled, select
from reapkit.progress import Progress, silent
from reapkit.samples import RoutedSamples
from reapkit.statistics import NUM_FOLDS, Statistics

# Shares of the experts that coverage is told for, besides the plan's own: those that are common.
RATIOS = ("0.125", "0.25", "0.3", "0.375", "0.5")
HALVES = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))

Kept = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class LayerEvidence:
    """What speaks for one layer's choice.

    Attributes:
        layer: its number.
        agreement: Jaccard index of the sets that two halves of the calibration would keep, the mean over ways of halving.
        predicted_error: re-routed error as a share of the layer's output, under the weights of the plan; None without a sample of tokens.
        never_routed: experts that no calibration token was routed to.
    """

    layer: int
    agreement: float
    predicted_error: float | None
    never_routed: tuple[int, ...]


@dataclass(frozen=True)
class Growth:
    """How close a part of the calibration comes to the choice of all of it.

    Attributes:
        tokens: in that part.
        agreement: Jaccard index of its kept sets and those of all tokens, the mean over layers and such parts.
    """

    tokens: int
    agreement: float


@dataclass(frozen=True)
class Coverage:
    """What of a domain the kept experts carry, were so many removed.

    Attributes:
        ratio: share of the experts removed; domain: its name.
        routed: share of the domain's routed pairs; gated: share of its sum of gate weight x output norm; both the mean over layers.
        worst_layer: the smallest share of routed pairs in a layer.
    """

    ratio: str
    domain: str
    routed: float
    gated: float
    worst_layer: float


@dataclass(frozen=True)
class Evidence:
    """All of it."""

    criterion: str
    num_kept: int
    num_experts: int
    tokens: int
    layers: tuple[LayerEvidence, ...]
    growth: tuple[Growth, ...]
    coverage: tuple[Coverage, ...]

    @property
    def agreement(self) -> float:
        """Between halves, the mean over layers."""
        return float(np.mean([layer.agreement for layer in self.layers]))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "agreement": self.agreement}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        outputs.save(path, (json.dumps(self.to_json(), indent=2) + "\n").encode())


def beside(plan: Path) -> Path:
    """Where the evidence for a plan is stored."""
    return plan.with_name(plan.name.removesuffix(".json") + ".evidence.json")


def gather(
    choice: Choice,
    statistics: Statistics,
    *,
    sample: RoutedSamples | None = None,
    ratio: str | float | None = None,
    progress: Progress = silent,
) -> Evidence:
    """What speaks for a choice.

    Args:
        choice: the plan and how it was made.
        statistics: what it rests on.
        sample: tokens for re-routed errors; needed under the criterion `reroute`.
        ratio: the plan's own, told beside the common ones.
        progress: told how far it is.
    """
    plan = choice.plan
    kept_of = _by_folds(choice, statistics, sample, progress)
    # Eliminating takes a while: one way of halving will do.
    halves = HALVES[:1] if plan.criterion == criteria.REROUTE else HALVES
    pairs = [(kept_of(one), kept_of(other)) for one, other in halves]
    every = {index: plan.kept[index] for index in statistics.layers if index in plan.kept}
    tokens_S = next(iter(statistics.layers.values())).tokens_S
    growth = []
    for count in (1, 2, 3):
        parts = [tuple(range(count))] if plan.criterion == criteria.REROUTE else [
            tuple((first + step) % NUM_FOLDS for step in range(count)) for first in range(NUM_FOLDS)
        ]  # fmt: skip
        shares = [jaccard(kept_of(folds)[index], kept) for folds in parts for index, kept in every.items()]
        tokens = [
            float(tokens_S[[row for row in range(len(tokens_S)) if row % NUM_FOLDS in folds]].sum()) for folds in parts
        ]
        growth.append(Growth(round(float(np.mean(tokens))), float(np.mean(shares))))
    layers = tuple(
        LayerEvidence(
            index,
            float(np.mean([jaccard(one[index], other[index]) for one, other in pairs])),
            None if sample is None or index not in sample.layers else _predicted(choice, sample, index),
            tuple(int(expert) for expert in np.flatnonzero(statistics.layers[index].count_SE.sum(0) == 0)),
        )
        for index in every
    )
    ratios = dict.fromkeys((*RATIOS, *(() if ratio is None else (str(ratio),))))
    coverage = [part for share in sorted(ratios, key=float) for part in _coverage(choice, statistics, share)]
    return Evidence(
        plan.criterion, plan.num_kept, plan.num_experts, statistics.num_tokens, layers, tuple(growth), tuple(coverage)
    )


def agreement_of_halves(statistics: Statistics, *, keep: int, criterion: str = "reap") -> float:
    """Jaccard index of the sets that two halves of the documents would keep, the mean over layers and ways of halving."""
    shares = []
    for halves in HALVES:
        one, other = (
            select(
                criteria.score(
                    {index: criteria.of_folds(layer, folds) for index, layer in statistics.layers.items()}, criterion
                ),
                keep=keep,
                num_groups=statistics.num_groups,
            )
            for folds in halves
        )
        shares += [jaccard(one[index], other[index]) for index in one]
    return float(np.mean(shares))


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Shared members over all members."""
    return len(set(one) & set(other)) / len(set(one) | set(other))


def _by_folds(
    choice: Choice, statistics: Statistics, sample: RoutedSamples | None, progress: Progress
) -> Callable[[tuple[int, ...]], Kept]:
    """What documents of some folds alone would keep, by the plan's own criterion."""
    plan = choice.plan
    done: dict[tuple[int, ...], Kept] = {}
    blend = None if "blend" not in plan.options else criteria.Blend.parse(plan.options["blend"], statistics.domains)

    def kept_of(folds: tuple[int, ...]) -> Kept:
        if folds in done:
            return done[folds]
        if plan.criterion == criteria.REROUTE:
            assert sample is not None
            scores = {}
            for index in sample.layers:
                layer = sample.layer(index, folds=folds)
                weight_T = token_weights(layer, plan.options["weights"], None if blend is None else blend.share_D)
                gone = eliminate(
                    layer, weight_T, keep=plan.num_kept, worst_domain=blend is not None and blend.share_D is None
                ).order
                scores[index] = np.where(np.isin(np.arange(plan.num_experts), gone), 0.0, 1.0)
            found = Scores(plan.criterion, scores)
        elif plan.criterion == criteria.EASY_EP:
            assert sample is not None
            found = score_sampled(sample, blend, folds=folds)
        elif plan.criterion == criteria.RANDOM:
            found = choice.scores
        else:
            part = {index: criteria.of_folds(layer, folds) for index, layer in statistics.layers.items()}
            found = score_blended(replace(statistics, layers=part), plan.criterion, blend)
        done[folds] = select(found, keep=plan.num_kept, num_groups=statistics.num_groups)
        progress("evidence", len(done), 5 if plan.criterion == criteria.REROUTE else 14, "parts")
        return done[folds]

    return kept_of


def _predicted(choice: Choice, sample: RoutedSamples, index: int) -> float:
    layer = sample.layer(index)
    weight_T = token_weights(layer, choice.plan.options.get("weights", "residual"))
    nothing = rerouted_total(layer, weight_T)
    return rerouted_error(layer, choice.plan.kept[index], weight_T) / nothing if nothing > 0 else 0.0


def rerouted_total(layer: RoutedSample, weight_T: Array) -> float:
    """What the error would be were the output nothing: the sum of w ‖y‖²."""
    relative_T = token_weights(layer, "relative")
    norm_sq_T = np.divide(layer.share_T, relative_T, out=np.zeros_like(relative_T), where=relative_T > 0)
    return float(weight_T @ norm_sq_T)


def _coverage(choice: Choice, statistics: Statistics, ratio: str) -> list[Coverage]:
    keep = max(num_kept(statistics.num_experts, ratio=ratio, num_groups=statistics.num_groups), statistics.top_k)
    if keep == choice.plan.num_kept:
        kept: Kept = choice.plan.kept
    elif choice.plan.criterion == criteria.REROUTE and keep < choice.plan.num_kept:
        return []  # eliminated no further
    else:
        kept = select(choice.scores, keep=keep, num_groups=statistics.num_groups)
    found = []
    for number, domain in enumerate(statistics.domains):
        routed: list[float] = []
        gated: list[float] = []
        for index, layer in statistics.layers.items():
            if index not in kept:
                continue
            part = of_domain(layer, number)
            chosen = list(kept[index])
            for shares, values_E in ((routed, part.count_SE.sum(0)), (gated, part.gated_norm_SE.sum(0))):
                total = float(values_E.sum())
                shares.append(float(values_E[chosen].sum()) / total if total > 0 else 1.0)
        found.append(Coverage(ratio, domain, float(np.mean(routed)), float(np.mean(gated)), min(routed)))
    return found
