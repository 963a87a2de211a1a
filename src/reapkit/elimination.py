"""Re-routed error: what a layer's output loses when its router may choose among kept experts only, and which experts to remove by it.

For a kept set K let y_K(t) be the output of the routed experts for token t with the router restricted to K. A token's candidates are the
experts that its router ranks best, and f_j their outputs; with coefficients c (of the model itself) and c_K (restricted to K), both zero
for whoever is not chosen,

    ‖y_K(t) - y(t)‖² = (c_K - c)ᵀ G (c_K - c),   G_ij = f_i · f_j,

so nothing as long as the hidden size is needed. L(K) is the sum of that over tokens, weighted. Backward elimination removes the expert
whose removal adds least to L, again and again: only the tokens whose choice it can change are computed anew.

A token of which fewer candidates are kept than the router takes is given those that are left, renormalised; such tokens are counted.

Shape suffixes: T = sampled tokens, C = candidates of a token by rank, E = experts, G = router groups, D = domains, U = C (C + 1) / 2 pairs
of candidates, N = some of the tokens, R = experts whose removal can change a token's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reapkit.errors import UsageError, did_you_mean
from reapkit.selection import Rule

Array = NDArray[np.float64]
WEIGHTS = ("residual", "relative", "plain", "residual-balanced", "relative-balanced", "plain-balanced")
# Tokens that are computed at once: temporaries are N x R x C values, 10 MB each with 16 candidates of which 8 are chosen; with groups 30.
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class RoutedSample:
    """What sampled tokens bring to one layer.

    Attributes:
        rule: the router's.
        expert_TC: the candidates by falling rank: without groups those that the model chose come first, which ties and rounding could
            part; with groups, whose limits part them, they are among the others.
        score_TC: what coefficients are made of: sigmoids, or exponentials relative to the token's largest.
        gram_TU: products of the candidates' outputs, the upper triangle row by row.
        stream_sq_T: ‖h‖² of the residual stream that the layer's output is added to.
        turn_T: 1 - cos(h, h'), h' being the stream after the whole layer.
        domain_T: number of the token's domain.
        share_T: tokens of the calibration that the sampled one stands for.
        choice_TE: scores by which experts are chosen, of all of them; only for routers with groups.
    """

    rule: Rule
    expert_TC: NDArray[np.integer[Any]]
    score_TC: NDArray[np.floating[Any]]
    gram_TU: NDArray[np.floating[Any]]
    stream_sq_T: NDArray[np.floating[Any]]
    turn_T: NDArray[np.floating[Any]]
    domain_T: NDArray[np.integer[Any]]
    share_T: NDArray[np.floating[Any]]
    choice_TE: NDArray[np.floating[Any]] | None = None

    def __len__(self) -> int:
        return len(self.expert_TC)


@dataclass(frozen=True)
class Elimination:
    """The order in which a layer's experts go, and what each step costs.

    Attributes:
        order: expert numbers, the first to go first; as many as were asked for.
        error: the relative error after each of them: L(K) over the sum of w ‖y‖².
        short: the share of tokens that have fewer kept candidates than the router takes, after each.
    """

    order: tuple[int, ...]
    error: tuple[float, ...]
    short: tuple[float, ...]


def check_weights(name: str) -> None:
    """Raise UsageError for weights that there are not."""
    if name not in WEIGHTS:
        raise UsageError(f"there are no weights {name!r}", hint=did_you_mean(name, WEIGHTS))


def token_weights(sample: RoutedSample, name: str, share_D: Sequence[float] | None = None) -> Array:
    """w_t of `plain`, `relative` (1 / ‖y‖²) or `residual` (1 / ‖h‖²); `-balanced` gives every domain the same total.

    A token whose norm is zero counts nothing.

    Args:
        sample: the layer's tokens.
        name: one of `WEIGHTS`.
        share_D: each domain's share of the total, in place of the one that it has.

    Raises:
        UsageError: no such weights.
    """
    check_weights(name)
    kind, _, balanced = name.partition("-")
    norm_sq_T = {"plain": np.ones(len(sample)), "residual": sample.stream_sq_T.astype(np.float64)}.get(kind)
    if norm_sq_T is None:
        norm_sq_T = _Losses(sample).output_sq_T
    weight_T: Array = sample.share_T * np.divide(1.0, norm_sq_T, out=np.zeros(len(sample)), where=norm_sq_T > 0)
    if balanced or share_D is not None:
        mass_D = np.bincount(sample.domain_T, weights=weight_T, minlength=0 if share_D is None else len(share_D))
        wanted_D = np.ones_like(mass_D) if share_D is None else np.asarray(share_D)
        weight_T *= np.divide(wanted_D, mass_D, out=np.zeros_like(mass_D), where=mass_D > 0)[sample.domain_T]
    return weight_T


def easy_ep(sample: RoutedSample, share_D: Sequence[float] | None = None) -> Array:
    """EASY-EP: the sum over routed tokens of g ‖f‖ max(1 - cos(h, h'), 0), so that tokens count that a layer turns.

    Dong et al. 2025, on domain-specific pruning of DeepSeek-R1. It is estimated from the sampled tokens.

    Args:
        sample: the layer's tokens.
        share_D: each domain's share of the tokens, in place of the one that it has.
    """
    own_TC = _Losses(sample).own_TC
    on_diagonal = np.cumsum([0, *range(sample.expert_TC.shape[1], 1, -1)])
    norm_TC = np.sqrt(sample.gram_TU[:, on_diagonal].astype(np.float64))
    weight_T = token_weights(sample, "plain", share_D) * np.maximum(sample.turn_T, 0)
    gated_TC = weight_T[:, None] * own_TC * norm_TC
    score_E = np.bincount(
        sample.expert_TC.ravel().astype(np.int64), weights=gated_TC.ravel(), minlength=sample.rule.num_experts
    )
    return score_E.astype(np.float64)


def rerouted_error(sample: RoutedSample, kept: Sequence[int], weight_T: Array) -> float:
    """L(K) of a kept set."""
    losses = _Losses(sample)
    losses.keep(kept)
    return float(weight_T @ losses.current(np.arange(len(sample))))


def eliminate(
    sample: RoutedSample, weight_T: Array, *, keep: int, worst_domain: bool = False, protected: Sequence[int] = ()
) -> Elimination:
    """Remove experts one by one, always the one whose removal adds least to L, until so many are left.

    Routers with groups lose one expert of each group before any group loses another, so that every multiple of the groups is balanced.
    Of experts that cost the same, the highest number goes.

    Args:
        sample: the layer's tokens.
        weight_T: their weights.
        keep: experts to leave.
        worst_domain: minimise the largest relative error of a domain in place of the sum.
        protected: experts that stay; no more in a group than are left in it.
    """
    rule = sample.rule
    num_experts, group_size = rule.num_experts, rule.num_experts // rule.num_groups
    losses = _Losses(sample)
    domains = sample.domain_T if worst_domain else np.zeros(len(sample), dtype=np.int64)
    num_domains = int(domains.max(initial=0)) + 1
    everyone = np.arange(len(sample))
    now_T = np.zeros(len(sample))
    relevant_TR, added_TR = losses.removals(everyone)
    total_D = np.bincount(domains, weights=weight_T * losses.output_sq_T, minlength=num_domains)
    scale_D = np.divide(1.0, total_D, out=np.zeros_like(total_D), where=total_D > 0)
    place_TR = domains[:, None] * (num_experts + 1) + relevant_TR
    order: list[int] = []
    error: list[float] = []
    short: list[float] = []
    open_groups = np.ones(rule.num_groups, dtype=bool)
    is_protected_E = np.isin(np.arange(num_experts), protected)
    for _ in range(num_experts - keep):
        added_DE = np.bincount(
            place_TR.ravel(), weights=(weight_T[:, None] * added_TR).ravel(), minlength=num_domains * (num_experts + 1)
        ).reshape(num_domains, -1)[:, :-1]
        now_D = np.bincount(domains, weights=weight_T * now_T, minlength=num_domains)
        cost_E = ((now_D[:, None] + added_DE) * scale_D[:, None]).max(0)
        cost_E[~losses.kept_E[:-1] | is_protected_E | ~np.repeat(open_groups, group_size)] = np.inf
        removed = num_experts - 1 - int(np.argmin(cost_E[::-1]))
        changed = losses.touched(removed, relevant_TR)
        losses.remove(removed)
        for start in range(0, len(changed), _TOKENS_AT_ONCE):
            part = changed[start : start + _TOKENS_AT_ONCE]
            now_T[part] = losses.current(part)
            relevant_TR[part], added_TR[part] = losses.removals(part)
        place_TR[changed] = domains[changed, None] * (num_experts + 1) + relevant_TR[changed]
        open_groups[removed // group_size] = False
        if not open_groups.any():
            open_groups[:] = True
        order.append(removed)
        error.append(float(weight_T @ now_T) * _inverse(float(weight_T @ losses.output_sq_T)))
        short.append(float((losses.num_left_T < rule.top_k).mean()) if len(sample) else 0.0)
    return Elimination(tuple(order), tuple(error), tuple(short))


class _Losses:
    """Errors of a layer's tokens under a kept set that shrinks."""

    def __init__(self, sample: RoutedSample) -> None:
        self._sample = sample
        rule = sample.rule
        num_candidates = sample.expert_TC.shape[1]
        self._expert_TC = sample.expert_TC.astype(np.int64)
        # One more, never kept: the place of "no expert".
        self.kept_E = np.ones(rule.num_experts + 1, dtype=bool)
        self.kept_E[-1] = False
        rows, columns = np.triu_indices(num_candidates)
        self._pair = np.zeros((num_candidates, num_candidates), dtype=np.int64)
        self._pair[rows, columns] = self._pair[columns, rows] = np.arange(len(rows))
        self.own_TC = np.zeros(sample.expert_TC.shape)
        self.output_sq_T = np.empty(len(sample))
        for part in _parts(len(sample)):
            self.own_TC[part] = self._coefficients_without(part, np.full((len(part), 1), rule.num_experts))[:, 0]
            self.output_sq_T[part] = self._squares(part, self.own_TC[part][:, None])[:, 0]
        self.num_left_T = np.full(len(sample), num_candidates)
        # The best of each group that does not count in its score: it would, were one before it removed.
        self._behind_TG = np.full((len(sample), rule.num_groups), rule.num_experts)
        # Tokens by candidate: those of expert e stand from start[e] to start[e + 1].
        self._token_P = np.argsort(self._expert_TC.ravel(), kind="stable") // max(num_candidates, 1)
        self._start = np.searchsorted(np.sort(self._expert_TC.ravel()), np.arange(rule.num_experts + 1))

    def keep(self, kept: Sequence[int]) -> None:
        """Let exactly these stay."""
        self.kept_E[:] = False
        self.kept_E[list(kept)] = True
        self.num_left_T = self.kept_E[self._expert_TC].sum(1)

    def remove(self, expert: int) -> None:
        self.kept_E[expert] = False
        self.num_left_T[self._token_P[self._start[expert] : self._start[expert + 1]]] -= 1

    def touched(self, expert: int, relevant_TR: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens whose choice, or whose choice after one more removal, may change when an expert goes."""
        having = self._token_P[self._start[expert] : self._start[expert + 1]]
        if self._sample.choice_TE is None:
            # The rank among kept candidates: those behind the next in line are not looked at.
            kept_NC = self.kept_E[self._expert_TC[having]]
            rank_NC = np.cumsum(kept_NC, 1)
            mine = self._expert_TC[having] == expert
            near: NDArray[np.int64] = having[(rank_NC * mine).max(1) <= self._sample.rule.top_k + 1]
            return near
        return np.union1d(having, np.flatnonzero((relevant_TR == expert).any(1) | (self._behind_TG == expert).any(1)))

    def current(self, tokens: NDArray[np.int64]) -> Array:
        """‖y_K - y‖² of some tokens."""
        result = np.empty(len(tokens))
        for part in _parts(len(tokens)):
            nobody = np.full((len(tokens[part]), 1), self._sample.rule.num_experts)
            result[part] = self._without(tokens[part], nobody)[:, 0]
        return result

    def removals(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
        """The experts whose removal can change a token's choice, [N, R] filled up with "no expert", and what each would add."""
        experts, added = [], []
        for part in _parts(len(tokens)):
            relevant_NR = self._relevant(tokens[part])
            nobody = np.full((len(relevant_NR), 1), self._sample.rule.num_experts)
            loss_NR = self._without(tokens[part], np.concatenate((nobody, relevant_NR), 1))
            experts.append(relevant_NR)
            added.append(np.where(relevant_NR < self._sample.rule.num_experts, loss_NR[:, 1:] - loss_NR[:, :1], 0.0))
        return np.concatenate(experts), np.concatenate(added)

    def _relevant(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        rule, nobody = self._sample.rule, self._sample.rule.num_experts
        expert_NC = self._expert_TC[tokens]
        if self._sample.choice_TE is None:
            kept_NC = self.kept_E[expert_NC]
            chosen = np.where(kept_NC, expert_NC, nobody)
            first = np.argsort(~kept_NC, axis=1, kind="stable")[:, : rule.top_k]
            nearest: NDArray[np.int64] = np.take_along_axis(chosen, first, 1)
            return nearest
        best_NGB, value_NGB = self._best_of_groups(tokens)
        allowed_NG = self._groups(value_NGB[:, :, : rule.group_best].sum(-1))
        size = rule.num_experts // rule.num_groups
        pick_NC = self.kept_E[expert_NC] & np.take_along_axis(allowed_NG, expert_NC // size, 1)
        first = np.argsort(~pick_NC, axis=1, kind="stable")[:, : rule.top_k]
        chosen = np.take_along_axis(np.where(pick_NC, expert_NC, nobody), first, 1)
        heads: NDArray[np.int64] = best_NGB[:, :, : rule.group_best].reshape(len(tokens), -1)
        self._behind_TG[tokens] = best_NGB[:, :, -1]
        # An expert that is both counts once.
        heads = np.where((heads[:, :, None] == chosen[:, None, :]).any(-1) | ~self.kept_E[heads], nobody, heads)
        relevant: NDArray[np.int64] = np.concatenate((chosen, heads), 1)
        return relevant

    def _masked(self, tokens: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        assert self._sample.choice_TE is not None
        return np.where(self.kept_E[:-1], self._sample.choice_TE[tokens], -np.inf)

    def _best_of_groups(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.floating[Any]]]:
        """The experts that make up each group's score and the one behind them, by falling score, and these scores, [N, G, best + 1]."""
        rule = self._sample.rule
        size = rule.num_experts // rule.num_groups
        grouped = self._masked(tokens).reshape(len(tokens), rule.num_groups, size)
        width = min(rule.group_best + 1, size)
        place = np.argpartition(-grouped, width - 1, axis=-1)[..., :width]
        value = np.take_along_axis(grouped, place, -1)
        order = np.argsort(-value, axis=-1, kind="stable")
        place, value = np.take_along_axis(place, order, -1), np.take_along_axis(value, order, -1)
        return place + size * np.arange(rule.num_groups)[None, :, None], value

    def _groups(self, score_G: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Which groups may be chosen from, by their scores, [..., G]."""
        order = np.argsort(-score_G, axis=-1, kind="stable")[..., : self._sample.rule.topk_groups]
        allowed = np.zeros(score_G.shape, dtype=bool)
        np.put_along_axis(allowed, order, True, -1)
        return allowed

    def _without(self, tokens: NDArray[np.int64], removed_NR: NDArray[np.int64]) -> Array:
        """‖y_K - y‖² with one more expert removed, [N, R]."""
        coefficient_NRC = self._coefficients_without(tokens, removed_NR)
        return self._squares(tokens, coefficient_NRC - self.own_TC[tokens][:, None])

    def _coefficients_without(self, tokens: NDArray[np.int64], removed_NR: NDArray[np.int64]) -> Array:
        """c_K with one more expert removed, [N, R, C]."""
        rule = self._sample.rule
        expert_NC = self._expert_TC[tokens]
        pick_NRC = self.kept_E[expert_NC][:, None] & (expert_NC[:, None] != removed_NR[:, :, None])
        if self._sample.choice_TE is not None:
            best_NGB, value_NGB = self._best_of_groups(tokens)
            hit_NRGB = best_NGB[:, None] == removed_NR[:, :, None, None]
            # With one of its best gone, the next of the group moves up.
            value_NRGB = np.where(hit_NRGB, -np.inf, value_NGB[:, None])
            score_NRG = -np.sort(-value_NRGB, axis=-1)[..., : rule.group_best].sum(-1)
            allowed_NRG = self._groups(score_NRG)
            group_NC = expert_NC // (rule.num_experts // rule.num_groups)
            pick_NRC &= np.take_along_axis(allowed_NRG, np.broadcast_to(group_NC[:, None], pick_NRC.shape), -1)
        pick_NRC &= np.cumsum(pick_NRC, -1) <= rule.top_k
        score_NC = self._sample.score_TC[tokens].astype(np.float64)
        return self._coefficients(score_NC[:, None], pick_NRC)

    def _coefficients(self, score: Array, chosen: NDArray[np.bool_]) -> Array:
        rule = self._sample.rule
        weighed = np.where(chosen, score, 0.0)
        if rule.normalise:
            total = weighed.sum(-1, keepdims=True) + rule.epsilon
            weighed = np.divide(weighed, total, out=np.zeros_like(weighed), where=total > 0)
        return weighed * rule.scaling

    def _squares(self, tokens: NDArray[np.int64], combination_NRC: Array) -> Array:
        """‖sum of c_j f_j‖², [N, R]."""
        gram_NCC = self._sample.gram_TU[tokens].astype(np.float64)[:, self._pair]
        result: Array = ((combination_NRC @ gram_NCC) * combination_NRC).sum(-1)
        return result


def _parts(count: int) -> list[NDArray[np.int64]]:
    return [np.arange(start, min(start + _TOKENS_AT_ONCE, count)) for start in range(0, count, _TOKENS_AT_ONCE)]


def _inverse(value: float) -> float:
    return 1.0 / value if value > 0 else 0.0
