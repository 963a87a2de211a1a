"""Domains count as a blend says, the worst one can be looked after, and experts with extreme outputs protected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reapkit import criteria, plans
from reapkit.criteria import Blend, blend_sums, of_domain, of_folds, rank_by_worst, score, super_experts
from reapkit.errors import UsageError
from reapkit.layout import Identity
from reapkit.statistics import NUM_FOLDS, SUM_NAMES, CalibrationRecord, LayerStatistics, Statistics

EXPERTS = 6


def layer_of(seed: int, *, domains: int = 2) -> LayerStatistics:
    """Random sums; the second domain has ten times as many tokens."""
    rng = np.random.default_rng(seed)
    rows = domains * NUM_FOLDS
    scale = np.repeat(10.0 ** np.arange(domains), NUM_FOLDS)
    sums = {name: rng.random((rows, EXPERTS)) * scale[:, None] for name in SUM_NAMES}
    return LayerStatistics(tokens_S=scale * 5, max_norm_E=rng.random(EXPERTS), **sums)


def statistics_of(layers: dict[int, LayerStatistics]) -> Statistics:
    source = Identity("somewhere", None, "layout", "routing", "weights")
    return Statistics(source, EXPERTS, 2, 1, ("code", "math"), {}, (CalibrationRecord("digest", 55),), (), layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("even", "--blend 'even' is neither uniform, max-min nor weights"),
        ("cod=1", "--blend names the domain 'cod', which was not observed"),
        ("code=much", "--blend gives 'code' the weight 'much', which is not a number"),
        ("code=0", "the weights of --blend 'code=0' are not positive"),
        ("code=2,math=-1", "the weights of --blend 'code=2,math=-1' are not positive"),
        ("code=nan", "the weights of --blend 'code=nan' are not positive"),
    ],
)
def test_a_blend_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Blend.parse(text, ("code", "math"))


def test_blends_are_shares_of_domains() -> None:
    assert Blend.parse("uniform", ("code", "math")).share_D == (0.5, 0.5)
    assert Blend.parse("code=3, math=1", ("code", "math")).share_D == (0.75, 0.25)
    assert Blend.parse("math=2", ("code", "math")).share_D == (0.0, 1.0)
    assert Blend.parse("max-min", ("code", "math")).share_D is None


@pytest.mark.parametrize("criterion", sorted(criteria.CRITERIA))
def test_a_blend_of_one_domain_scores_as_that_domain_alone(criterion: str) -> None:
    layer = layer_of(0)
    for domain, share in ((0, (1.0, 0.0)), (1, (0.0, 1.0))):
        one = score({0: blend_sums(layer, share)}, criterion).score_E[0]
        alone = score({0: of_domain(layer, domain)}, criterion).score_E[0]
        np.testing.assert_allclose(one / one.sum(), alone / alone.sum(), rtol=1e-12)


def test_a_uniform_blend_weighs_tokens_so_that_domains_are_equally_long() -> None:
    layer = layer_of(1)
    blended = blend_sums(layer, (0.5, 0.5))
    tokens = blended.tokens_S.reshape(2, NUM_FOLDS).sum(1)
    np.testing.assert_allclose(tokens, layer.tokens_S.sum() / 2)
    expected = layer.count_SE[:4].sum(0) / 20 + layer.count_SE[4:].sum(0) / 200
    found = blended.count_SE.sum(0)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum())


def test_folds_are_taken_from_every_domain() -> None:
    layer = layer_of(2)
    found = of_folds(layer, (1, 3))
    np.testing.assert_array_equal(found.count_SE[[1, 3, 5, 7]], layer.count_SE[[1, 3, 5, 7]])
    assert not found.count_SE[::2].any() and not found.tokens_S[::2].any()


def test_the_worst_domain_keeps_more_under_max_min_than_under_the_sum() -> None:
    score_DE = np.array([[9.0, 5, 4, 0, 0, 1], [0, 0, 1, 90, 80, 70]])

    def worst(kept: list[int]) -> float:
        return float((score_DE[:, kept].sum(1) / score_DE.sum(1)).min())

    by_sum = sorted(np.argsort(-score_DE.sum(0))[:3].tolist())
    by_worst = sorted(np.argsort(-rank_by_worst(score_DE))[:3].tolist())
    assert by_sum == [3, 4, 5] and by_worst == [0, 3, 4]
    assert worst(by_worst) > worst(by_sum)


def test_max_min_removes_from_groups_in_turn() -> None:
    rank = rank_by_worst(np.random.default_rng(0).random((2, 8)), num_groups=4)
    assert sorted(rank) == list(range(8))
    first = np.argsort(rank)[:4]
    assert sorted(first // 2) == [0, 1, 2, 3]


def test_blends_reach_the_plan_and_are_recorded() -> None:
    layer = layer_of(0)
    layer.count_SE[:] = np.repeat([[9.0, 5, 4, 0, 0, 1], [0, 0, 1, 90, 80, 70]], NUM_FOLDS, axis=0)
    layer.tokens_S[:] = np.repeat([19.0, 241.0], NUM_FOLDS)
    statistics = statistics_of({0: layer})
    found = {
        blend: plans.plan(statistics, criterion="frequency", keep=3, blend=blend)
        for blend in (None, "uniform", "max-min", "code=1")
    }
    assert [plan.kept[0] for plan in found.values()] == [(3, 4, 5), (0, 3, 5), (0, 3, 4), (0, 1, 2)]
    assert [dict(plan.options) for plan in found.values()] == [
        {}, {"blend": "uniform"}, {"blend": "max-min"}, {"blend": "code=1"},
    ]  # fmt: skip


def with_extreme(index: int) -> dict[int, LayerStatistics]:
    """Expert 4 of a layer has outputs fifty times as large as any other, and the lowest scores."""
    layers = {number: layer_of(number) for number in range(40)}
    extreme = layers[index]
    extreme.max_norm_E[4] = 50.0
    extreme.gated_norm_SE[:, 4] = 1e-6
    return layers


def test_super_experts_are_those_above_a_percentile_and_a_part_of_the_largest() -> None:
    layers = with_extreme(3)
    assert super_experts(layers) == {3: (4,)}
    large = layers[7].max_norm_E
    layers[7] = replace(layers[7], max_norm_E=np.array([0, 4.9, 0, 0, 0, 0]))  # below a tenth of the largest
    assert super_experts(layers) == {3: (4,)}
    layers[7] = replace(layers[7], max_norm_E=np.array([0, 5.1, 0, 0, 0, 0]))
    assert super_experts(layers) == {3: (4,), 7: (1,)}
    # One half per cent of 240 experts is one or two, whatever their norms.
    layers[7] = replace(layers[7], max_norm_E=large + 20)
    assert sum(map(len, super_experts(layers).values())) <= 2


def test_a_super_expert_is_protected_on_request_and_reported_where_it_is_dropped() -> None:
    statistics = statistics_of(with_extreme(3))
    bare, protected = (plans.choose(statistics, keep=3, protect=protect) for protect in (None, "super"))
    assert 4 not in bare.plan.kept[3] and bare.super_dropped == {3: (4,)}
    assert 4 in protected.plan.kept[3] and protected.super_dropped == {}
    assert all(bare.plan.kept[index] == protected.plan.kept[index] for index in bare.plan.kept if index != 3)
    assert protected.plan.options == {"protect": "super"}
    with pytest.raises(UsageError, match="--protect 'supr' is not known"):
        plans.choose(statistics, keep=3, protect="supr")


def test_options_survive_the_file(tmp_path: Path) -> None:
    plan = plans.plan(statistics_of({0: layer_of(0)}), keep=3, blend="uniform", protect="super")
    plan.save(tmp_path / "plan.json")
    assert plans.PruningPlan.load(tmp_path / "plan.json") == plan
