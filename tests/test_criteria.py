"""Every criterion equals what its definition gives by hand."""

from __future__ import annotations

import numpy as np
import pytest

from reapkit import plans
from reapkit.criteria import CRITERIA, OPTIONS, OTHERS, RANDOM, USED, check, require_used, score, score_at_random
from reapkit.errors import UsageError
from reapkit.statistics import LayerStatistics

# Six tokens, top-2 of four experts: (token, expert, gate weight g, output norm ‖f‖). Expert 3 is never chosen.
ROUTED = [
    (0, 0, 0.75, 4.0), (0, 1, 0.25, 8.0),
    (1, 0, 0.50, 2.0), (1, 1, 0.50, 6.0),
    (2, 0, 0.25, 8.0), (2, 2, 0.75, 1.0),
    (3, 0, 0.50, 2.0), (3, 1, 0.50, 4.0),
    (4, 0, 1.00, 0.0), (4, 2, 0.00, 9.0),
    (5, 0, 0.75, 4.0), (5, 1, 0.25, 2.0),
]  # fmt: skip
BY_HAND = {
    # expert 0: 3 + 1 + 2 + 1 + 0 + 3 = 10 over 6; expert 1: 2 + 3 + 2 + 0.5 = 7.5 over 4; expert 2: 0.75 + 0 over 2
    "reap": [10 / 6, 7.5 / 4, 0.75 / 2, 0],
    "gated-norm-sum": [10, 7.5, 0.75, 0],
    "frequency": [6, 4, 2, 0],
    # expert 0: 4 + 2 + 8 + 2 + 0 + 4; expert 1: 8 + 6 + 4 + 2; expert 2: 1 + 9
    "ean-sum": [20, 20, 10, 0],
    "ean-mean": [20 / 6, 5, 5, 0],
    "man": [20 / 6, 5, 5, 0],
    # expert 0: 16 + 4 + 64 + 4 + 0 + 16; expert 1: 64 + 36 + 16 + 4; expert 2: 1 + 81
    "msan": [104 / 6, 30, 41, 0],
    # expert 0: 0.75 + 0.5 + 0.25 + 0.5 + 1 + 0.75; expert 1: 0.25 + 0.5 + 0.5 + 0.25; expert 2: 0.75 + 0
    "gate-sum": [3.75, 1.5, 0.75, 0],
}


def observed() -> LayerStatistics:
    """The tokens above, token t in row t mod 4."""
    layer = LayerStatistics.zeros(4, 4)
    for token, expert, gate, norm in ROUTED:
        at = token % 4, expert
        layer.count_SE[at] += 1
        layer.gate_SE[at] += gate
        layer.norm_SE[at] += norm
        layer.norm_sq_SE[at] += norm**2
        layer.gated_norm_SE[at] += gate * norm
    return layer


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_a_criterion_equals_the_hand_computation(criterion: str) -> None:
    np.testing.assert_allclose(score({7: observed()}, criterion).score_E[7], BY_HAND[criterion], rtol=1e-15)


def test_every_criterion_says_which_options_it_uses_and_refuses_the_others() -> None:
    assert USED.keys() == {*CRITERIA, *OTHERS}
    for criterion, used in USED.items():
        require_used(criterion, {*used, "ratio", "keep"})
        for option in OPTIONS - used:
            with pytest.raises(UsageError) as caught:
                require_used(criterion, {option})
            name = "--" + option.replace("_", "-")
            assert caught.value.message == f"{name} does not go with --criterion {criterion}, which would ignore it"
            assert caught.value.hint == f"leave out {name}"


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_an_expert_that_was_never_routed_to_scores_zero_without_warnings(criterion: str) -> None:
    with np.errstate(all="raise"):
        assert score({0: observed()}, criterion).score_E[0][3] == 0
        assert not score({0: LayerStatistics.zeros(4, 4)}, criterion).score_E[0].any()


def test_criteria_choose_different_experts_where_the_definitions_say_so() -> None:
    kept = {name: plans.select(score({0: observed()}, name), keep=1)[0] for name in CRITERIA}
    # ean-sum ties experts 0 and 1, ean-mean 1 and 2: the lower number stays.
    assert kept == {
        "reap": (1,), "gated-norm-sum": (0,), "frequency": (0,), "ean-sum": (0,), "ean-mean": (1,), "gate-sum": (0,),
        "man": (1,), "msan": (2,),
    }  # fmt: skip


@pytest.mark.parametrize("keep", range(1, 9))
def test_ties_keep_the_lower_numbers(keep: int) -> None:
    layer = LayerStatistics.zeros(4, 8)
    layer.count_SE[:, :] = 1
    assert plans.select(score({0: layer}, "frequency"), keep=keep)[0] == tuple(range(keep))


def test_scoring_leaves_the_statistics_alone() -> None:
    layer = observed()
    for criterion in CRITERIA:
        score({0: layer}, criterion).score_E[0][:] = -1
    np.testing.assert_array_equal(layer.count_SE.sum(0), BY_HAND["frequency"])


def test_random_scores_depend_on_seed_and_layer_number_only() -> None:
    scores = score_at_random([3, 5], 16, seed=1).score_E
    alone = score_at_random([5], 16, seed=1).score_E
    np.testing.assert_array_equal(scores[5], alone[5])
    assert not np.array_equal(scores[3], scores[5])
    assert not np.array_equal(scores[5], score_at_random([5], 16, seed=2).score_E[5])
    assert len(set(scores[3])) == 16


def test_an_unknown_criterion_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="there is no criterion 'raep'") as caught:
        score({0: observed()}, "raep")
    assert caught.value.hint == "did you mean 'reap'?"
    with pytest.raises(UsageError, match="'random' is no function of statistics alone"):
        score({0: observed()}, RANDOM)
    for name in OTHERS:
        check(name)
