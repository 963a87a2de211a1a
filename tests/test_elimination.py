"""Backward elimination on re-routed errors: equal to brute force over subsets, to a naive implementation, and to what routers would do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from reapkit import rerouting
from reapkit.elimination import WEIGHTS, RoutedSample, easy_ep, eliminate, rerouted_error, token_weights
from reapkit.errors import UsageError
from reapkit.selection import Rule

TOKENS, EXPERTS, WIDTH = 60, 8, 5
RULES = {
    "sigmoid": Rule(EXPERTS, 3, "sigmoid", True, 1.0, 0.0),
    "softmax": Rule(EXPERTS, 3, "softmax", True, 1.0, 0.0),
    "sigmoid, not renormalised": Rule(EXPERTS, 3, "sigmoid", False, 2.5, 0.0),
    "groups": Rule(EXPERTS, 2, "sigmoid", True, 2.5, 1e-20, num_groups=2, topk_groups=1),
    "four groups": Rule(16, 3, "sigmoid", True, 1.0, 1e-20, num_groups=4, topk_groups=2),
    "groups by their best": Rule(EXPERTS, 2, "sigmoid", True, 1.0, 0.0, num_groups=2, topk_groups=1, group_best=1),
}


def least_in_group(rule: Rule) -> int:
    """Experts that any plan leaves in a group."""
    return max(2, -(-rule.top_k // rule.topk_groups)) if rule.num_groups > 1 else 0


class Layer:
    """Tokens, their logits and what every expert makes of them, in float64: the truth, with nothing left out."""

    def __init__(self, rule: Rule, *, seed: int = 0, tokens: int = TOKENS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rule = rule
        self.logits = torch.randn(tokens, rule.num_experts, generator=generator) + torch.randn(
            rule.num_experts, generator=generator
        )
        self.bias = 0.3 * torch.randn(rule.num_experts, generator=generator) if rule.scoring == "sigmoid" else None
        self.outputs = torch.randn(tokens, rule.num_experts, WIDTH, generator=generator, dtype=torch.float64)
        self.stream_sq = 1 + torch.rand(tokens, generator=generator).numpy()
        self.turn = torch.rand(tokens, generator=generator).numpy() - 0.1
        self.domain = np.arange(tokens) % 3 % 2

    def output(self, kept: Sequence[int] | None = None) -> np.ndarray:
        expert, gate = rerouting.route(self.rule, self.logits, self.bias, kept=kept)
        rows = torch.arange(len(expert))[:, None]
        return (gate.double()[..., None] * self.outputs[rows, expert]).sum(1).numpy()

    def true_errors(self, kept: Sequence[int]) -> np.ndarray:
        return ((self.output(kept) - self.output()) ** 2).sum(-1)

    def sample(self, candidates: int) -> RoutedSample:
        score, choice = rerouting.scores_of(self.rule, self.logits, self.bias)
        chosen = rerouting.route(self.rule, self.logits, self.bias)[0]
        rest = choice.scatter(1, chosen, -torch.inf).argsort(dim=1, descending=True)
        expert = torch.cat((chosen, rest), 1)[:, :candidates]
        if self.rule.num_groups > 1:
            expert = expert.gather(1, choice.gather(1, expert).argsort(dim=1, descending=True))
        outputs = self.outputs[torch.arange(len(expert))[:, None], expert].numpy()
        gram = outputs @ outputs.transpose(0, 2, 1)
        rows, columns = np.triu_indices(candidates)
        return RoutedSample(
            self.rule,
            expert.numpy(),
            score.gather(1, expert).numpy(),
            gram[:, rows, columns],
            self.stream_sq,
            self.turn,
            self.domain,
            np.ones(len(expert)),
            choice.numpy() if self.rule.num_groups > 1 else None,
        )


def naive_order(layer: Layer, weight: np.ndarray, keep: int) -> list[int]:
    """What backward elimination says, with every error computed from whole outputs."""
    rule = layer.rule
    size = rule.num_experts // rule.num_groups
    kept, order, gone = list(range(rule.num_experts)), [], set[int]()
    while len(kept) > keep:
        open_to = [e for e in kept if e // size not in gone]
        losses = {e: float(weight @ layer.true_errors([k for k in kept if k != e])) for e in open_to}
        least = min(losses.values())
        removed = max(e for e, loss in losses.items() if loss <= least * (1 + 1e-12))
        kept.remove(removed)
        order.append(removed)
        gone.add(removed // size)
        if len(gone) == rule.num_groups:
            gone = set()
    return order


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_error_of_every_subset_is_the_true_one(rule: Rule) -> None:
    layer = Layer(rule, tokens=20)
    sample = layer.sample(rule.num_experts)
    size = rule.num_experts // rule.num_groups
    checked = 0
    for count in range(rule.top_k, rule.num_experts + 1):
        subsets = itertools.combinations(range(rule.num_experts), count)
        for kept in itertools.islice(subsets, 0, None, 41 if rule.num_experts > EXPERTS else 1):
            if min(np.bincount(np.array(kept) // size, minlength=rule.num_groups)) < least_in_group(rule):
                continue
            np.testing.assert_allclose(
                rerouted_error(sample, kept, np.ones(len(sample))), layer.true_errors(kept).sum(), rtol=1e-5, atol=1e-9
            )
            checked += 1
    assert checked >= 40


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_greedy_order_is_that_of_a_naive_implementation(rule: Rule, weights: str) -> None:
    layer = Layer(rule, seed=1)
    sample = layer.sample(rule.num_experts)
    keep = max(rule.top_k, rule.num_groups * least_in_group(rule))
    weight = token_weights(sample, weights)
    found = eliminate(sample, weight, keep=keep)
    assert list(found.order) == naive_order(layer, weight, keep)
    kept = sorted(set(range(rule.num_experts)) - set(found.order))
    total = weight @ (layer.output() ** 2).sum(-1)
    np.testing.assert_allclose(found.error[-1], weight @ layer.true_errors(kept) / total, rtol=1e-5)
    assert set(found.short) == {0.0}


@pytest.mark.parametrize("rule", [RULES["sigmoid"], RULES["groups"]], ids=["sigmoid", "groups"])
def test_one_order_serves_all_ratios(rule: Rule) -> None:
    sample = Layer(rule, seed=2).sample(rule.num_experts)
    weight = token_weights(sample, "residual")
    long, short = (eliminate(sample, weight, keep=keep) for keep in (4, 6))
    assert long.order[: len(short.order)] == short.order and long.error[: len(short.error)] == short.error


def test_groups_stay_equally_large() -> None:
    sample = Layer(RULES["four groups"], seed=3).sample(16)
    order = eliminate(sample, token_weights(sample, "plain"), keep=8).order
    for done in (4, 8):
        assert set(np.bincount(np.array(order[:done]) // 4, minlength=4)) == {done // 4}


def test_experts_that_cost_nothing_go_first_and_the_highest_number_of_them() -> None:
    layer = Layer(RULES["sigmoid"], seed=4)
    layer.logits[:, [2, 5]] = -50.0  # never among the best
    layer.bias = None
    order = eliminate(layer.sample(6), np.ones(TOKENS), keep=5).order
    assert order[:2] == (5, 2)


def test_weights_of_tokens() -> None:
    layer = Layer(RULES["sigmoid"])
    sample = replace(layer.sample(EXPERTS), share_T=np.linspace(1, 2, TOKENS))
    np.testing.assert_allclose(token_weights(sample, "plain"), sample.share_T)
    np.testing.assert_allclose(token_weights(sample, "residual"), sample.share_T / layer.stream_sq)
    np.testing.assert_allclose(
        token_weights(sample, "relative"), sample.share_T / (layer.output() ** 2).sum(-1), rtol=1e-5
    )
    for name in WEIGHTS[3:]:
        mass = np.bincount(sample.domain_T, weights=token_weights(sample, name))
        np.testing.assert_allclose(mass[0], mass[1])
    with pytest.raises(UsageError, match="there are no weights 'residul'") as caught:
        token_weights(sample, "residul")
    assert "residual" in str(caught.value.hint)


def test_with_fewer_candidates_the_error_is_exact_until_a_token_runs_out_of_them() -> None:
    layer = Layer(RULES["sigmoid"], seed=5)
    sample, whole = layer.sample(5), layer.sample(EXPERTS)
    weight = np.ones(TOKENS)
    found, exact = eliminate(sample, weight, keep=3), eliminate(whole, weight, keep=3)
    first_short = next(step for step, share in enumerate(found.short) if share > 0)
    assert first_short > 0
    np.testing.assert_allclose(found.error[:first_short], exact.error[:first_short], rtol=1e-5)
    kept = sorted(set(range(EXPERTS)) - set(found.order))
    left = np.isin(sample.expert_TC, kept).sum(1)
    assert found.short[-1] == (left < 3).mean() > 0


def test_the_worst_domain_loses_less_where_it_is_what_is_minimised() -> None:
    layer = Layer(RULES["sigmoid"], seed=6)
    layer.outputs[layer.domain == 1] *= 0.1  # hardly counts in the sum, and prefers other experts
    layer.logits[torch.from_numpy(layer.domain == 1), :4] += 3.0
    sample = layer.sample(EXPERTS)
    weight = np.ones(TOKENS)

    def worst(order: Sequence[int]) -> float:
        error = layer.true_errors(sorted(set(range(EXPERTS)) - set(order)))
        total = (layer.output() ** 2).sum(-1)
        return max(error[layer.domain == d].sum() / total[layer.domain == d].sum() for d in (0, 1))

    by_sum, by_worst = (eliminate(sample, weight, keep=4, worst_domain=flag).order for flag in (False, True))
    assert worst(by_worst) < worst(by_sum)


@pytest.mark.parametrize("rule", [RULES["sigmoid"], RULES["groups"]], ids=["sigmoid", "groups"])
def test_easy_ep_is_its_formula_token_by_token(rule: Rule) -> None:
    layer = Layer(rule, seed=7)
    expert, gate = rerouting.route(rule, layer.logits, layer.bias)
    expected = np.zeros(EXPERTS)
    for token in range(TOKENS):
        for e, g in zip(expert[token].tolist(), gate[token].tolist(), strict=True):
            expected[e] += g * float(layer.outputs[token, e].norm()) * max(float(layer.turn[token]), 0.0)
    np.testing.assert_allclose(easy_ep(layer.sample(6), None), expected, rtol=1e-5)
