"""Plans: how many experts stay, which, and for which checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from conftest import PlanFor
from reapkit import compression, plans
from reapkit.criteria import Scores
from reapkit.errors import PlanError, UsageError
from reapkit.layout import Identity
from reapkit.plans import PruningPlan, num_kept, select

SOURCE = Identity("a/b", None, "l" * 64, "r" * 64, "w" * 64)


def plan(**changes: Any) -> PruningPlan:
    whole = {"source": SOURCE, "criterion": "reap", "num_experts": 8, "top_k": 2, "kept": {0: (1, 2, 5), 3: (0, 1, 7)}}
    return PruningPlan(**{**whole, **changes})


@pytest.mark.parametrize(
    ("num_experts", "ratio", "kept"),
    [
        (256, "0.25", 192),
        (256, 0.30, 180),
        (256, "0.4", 154),
        (256, 0.5, 128),
        (100, 0.29, 71),
        (64, 0, 64),
        (48, "0.3", 34),
    ],
)
def test_the_ratio_is_read_as_a_decimal_and_the_dropped_count_rounded_down(
    num_experts: int, ratio: Any, kept: int
) -> None:
    assert num_kept(num_experts, ratio=ratio) == kept


def test_router_groups_round_the_kept_count_up() -> None:
    assert num_kept(256, ratio="0.3", num_groups=8) == 184
    assert num_kept(256, keep=255, num_groups=8) == 256


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give either --ratio or --keep"),
        ({"ratio": "0.5", "keep": 3}, "give either --ratio or --keep"),
        ({"ratio": "a"}, "--ratio 'a' is not a number"),
        ({"ratio": "nan"}, "--ratio nan is not a share of the experts to remove"),
        ({"ratio": "1"}, "--ratio 1 is not a share"),
        ({"ratio": "25"}, "--ratio 25 is not a share"),
        ({"ratio": "-0.1"}, "--ratio -0.1 is not a share"),
        ({"keep": 0}, "--keep 0 is not between 1 and the 8 experts of a layer"),
        ({"keep": 9}, "--keep 9 is not between 1 and the 8 experts of a layer"),
    ],
)
def test_a_target_that_makes_no_sense_is_a_usage_error(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        num_kept(8, **options)
    assert sentence in caught.value.message


def test_the_highest_scores_stay_ties_keep_the_lower_number_groups_stay_equal() -> None:
    scores = Scores("reap", {4: np.array([0.0, 3.0, 1.0, 1.0, 9.0, 8.0, 7.0, 6.0])})
    assert select(scores, keep=4) == {4: (4, 5, 6, 7)}
    assert select(scores, keep=4, num_groups=2) == {4: (1, 2, 4, 5)}
    assert select(scores, keep=6) == {4: (1, 2, 4, 5, 6, 7)}


def test_fewer_experts_than_each_token_is_routed_to_are_refused_with_the_way_out() -> None:
    with pytest.raises(PlanError) as caught:
        plan(num_experts=64, top_k=8, kept={0: (0, 1, 2, 3, 4, 5)})
    assert caught.value.message == "keeping 6 of 64 experts is fewer than the 8 that each token is routed to"
    assert caught.value.hint == "keep at least 8: --ratio 0.875 or less"
    assert num_kept(64, ratio="0.875") == 8


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        ((2, 1, 5), "layer 0 of the plan lists the expert 1 twice or out of order"),
        ((1, 1, 5), "layer 0 of the plan lists the expert 1 twice or out of order"),
        ((1, 2, 8), "layer 0 of the plan keeps the expert 8, and there are 8"),
        ((-1, 2, 5), "layer 0 of the plan keeps the expert -1, and there are 8"),
    ],
)
def test_kept_experts_are_ascending_numbers_of_the_layer(kept: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        plan(kept={0: kept})


def test_every_layer_keeps_equally_many() -> None:
    with pytest.raises(PlanError, match=r"equally many experts in every layer, and this one keeps \[2, 3\]"):
        plan(kept={0: (1, 2, 3), 1: (1, 2)})


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"criterion": "random", "blend": "uniform"}, "--blend does not go with --criterion random,"),
        ({"criterion": "random", "protect": "super"}, "--protect does not go with --criterion random on a checkpoint,"),
        ({"criterion": "random", "weights": "plain"}, "--weights does not go with --criterion random,"),
    ],
)
def test_choosing_refuses_what_it_would_not_use(m2: Path, options: dict[str, Any], refused: str) -> None:
    with pytest.raises(UsageError, match=refused):
        plans.choose(m2, keep=5, **options)


def test_compressing_refuses_what_it_would_not_use(m2: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--reroute-candidates does not go with --criterion frequency,"):
        compression.compress(
            m2, tmp_path / "out", compression.Target(keep=4, criterion="frequency", reroute_candidates=4)
        )


def test_a_saved_plan_is_read_back_and_has_a_line_per_layer(tmp_path: Path) -> None:
    saved = plan(calibration=("abc",), seed=3)
    saved.save(tmp_path / "deep" / "plan.json")
    assert PruningPlan.load(tmp_path / "deep" / "plan.json") == saved
    assert '    "3": [0, 1, 7]\n' in (tmp_path / "deep" / "plan.json").read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "x"}, "is not a plan of reapkit"),
        ({"surplus": 1}, "has the unknown entry 'surplus'"),
        ({"kept": {"a": [1]}}, "is not a whole plan: ValueError"),
        ({"kept": {"0": [1, 2.5, 3]}}, "is not a whole plan: ValueError 2.5 is not the number of an expert"),
        ({"kept": None}, "is not a whole plan"),
        ({"source": {}}, "is not a whole plan: ValueError the source has the entries []"),
        ({"num_kept": 4}, "says it keeps 4 experts a layer and lists 3"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "plan.json"
    tiny.write_json(path, {**plan().to_json(), **change})
    with pytest.raises(PlanError) as caught:
        PruningPlan.load(path)
    assert sentence in caught.value.message


def test_a_file_that_is_not_json_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match=r"plan\.json is not valid JSON") as caught:
        PruningPlan.load(tmp_path / "plan.json")
    assert caught.value.hint == "make one with reapkit plan"


def test_a_missing_plan_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no plan") as caught:
        PruningPlan.load(tmp_path / "plan.json")
    assert caught.value.hint == "make one with reapkit plan"


def test_a_plan_fits_its_checkpoint_and_no_other(plan_for: PlanFor, m2: Path) -> None:
    _, layout, fitting = plan_for(m2, 5)
    found = fitting.source
    fitting.require_fits(layout, found)
    fitting.require_fits(layout, replace(found, layout="of a sibling in another format", weights="in its bytes"))
    fitting.require_fits(layout, replace(found, origin="under another name", revision="of a copy"))
    with pytest.raises(
        PlanError, match=r"the plan is for .* \(routers .*, and this checkpoint has other routers \(x\)"
    ):
        fitting.require_fits(layout, replace(found, routing="x"))
    with pytest.raises(PlanError, match=r"this checkpoint has other weights \(x\)"):
        fitting.require_fits(layout, replace(found, weights="x"))
    with pytest.raises(PlanError, match="the plan is for 9 experts per layer, and the checkpoint has 8"):
        replace(fitting, num_experts=9).require_fits(layout, found)
    with pytest.raises(PlanError, match=r"the MoE layer 2 is only in the checkpoint \(1 such layers\)"):
        replace(fitting, kept={0: fitting.kept[0], 1: fitting.kept[1]}).require_fits(layout, found)
    edited = replace(fitting, top_k=1, kept=dict.fromkeys(fitting.kept, (3,)))
    with pytest.raises(PlanError, match="keeping 1 of 8 experts is fewer than the 2 that each token is routed to"):
        edited.require_fits(layout, found)


def test_a_random_plan_depends_on_its_seed_alone(m2: Path) -> None:
    first, again, other = (plans.choose(m2, criterion="random", keep=5, seed=seed).plan for seed in (1, 1, 2))
    assert first == again and first.kept != other.kept
    assert first.seed == 1 and first.source.origin == str(m2)


# ---- MTP layers, which no calibration runs


def test_mtp_layers_take_the_kept_set_of_the_last_layer_by_default_and_say_so() -> None:
    whole = plan().with_mtp([4, 5])
    assert whole.kept == {0: (1, 2, 5), 3: (0, 1, 7), 4: (0, 1, 7), 5: (0, 1, 7)}
    assert whole.unmeasured == {4: 3, 5: 3}
    assert whole.with_mtp([4, 5]) is whole
    assert plan().with_mtp([]) == plan()


def test_mtp_layers_take_the_kept_set_of_a_named_layer() -> None:
    for spelling in ("same-as-layer-0", "same-as-layer 0", "same-as-layer=0"):
        whole = plan().with_mtp([4]).with_mtp([4], spelling)
        assert (whole.kept[4], whole.unmeasured) == ((1, 2, 5), {4: 0})
    with pytest.raises(UsageError, match="layer 4 has no experts of its own choice in the plan"):
        plan().with_mtp([4]).with_mtp([4], "same-as-layer-4")
    with pytest.raises(UsageError, match="'same-as-first' is not one of: same-as-last, same-as-layer-N or drop"):
        plan().with_mtp([], "same-as-first")
    with pytest.raises(UsageError, match="the checkpoint has no MTP layers with experts"):
        plan().with_mtp([], "same-as-last")


def test_dropped_mtp_layers_leave_the_plan() -> None:
    dropped = plan().with_mtp([4]).with_mtp([4], "drop")
    assert dropped.drop_mtp and dropped.kept == plan().kept and dropped.unmeasured == {}
    assert dropped.with_mtp([4]) is dropped
    assert dropped.with_mtp([4], "same-as-last") == plan().with_mtp([4])


def test_what_a_person_chose_for_an_mtp_layer_is_left_alone() -> None:
    edited = plan(kept={0: (1, 2, 5), 3: (0, 1, 7), 4: (2, 3, 4)})
    assert edited.with_mtp([4]) is edited


def test_a_saved_plan_remembers_what_was_not_measured(tmp_path: Path) -> None:
    for saved in (plan().with_mtp([4]), plan().with_mtp([4], "drop")):
        saved.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json") == saved
    with pytest.raises(PlanError, match="layer 4 of the plan does not keep the experts of layer 3, as it says"):
        plan(kept={3: (0, 1, 7), 4: (0, 1, 6)}, unmeasured={4: 3})


def test_a_plan_with_mtp_layers_prunes_a_sibling_that_has_none(plan_for: PlanFor, m2: Path) -> None:
    _, layout, fitting = plan_for(m2, 4)
    found = fitting.source
    with_mtp = fitting.with_mtp([3])
    for policy in (None, "drop"):
        alone = with_mtp.for_layout(layout, policy)
        assert alone.kept == fitting.kept and alone.unmeasured == {}
        alone.require_fits(layout, found)
    with pytest.raises(UsageError, match="the checkpoint has no MTP layers with experts"):
        with_mtp.for_layout(layout, "same-as-last")


@pytest.mark.parametrize(
    "change",
    [
        {"num_kept": None, "remove": "num_kept"},
        {"drop_mtp": "false"},
        {"drop_mtp": 1},
        {"unmeasured": [3]},
        {"unmeasured": {"0": 3, "3": 0}, "kept": {"0": [1, 2, 5], "3": [1, 2, 5]}},
    ],
)
def test_a_plan_that_says_nonsense_of_mtp_layers_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    described = {**plan().to_json(), **change}
    if removed := described.pop("remove", None):
        del described[removed]
    tiny.write_json(tmp_path / "plan.json", described)
    with pytest.raises(PlanError):
        PruningPlan.load(tmp_path / "plan.json")


def test_mtp_layers_cannot_follow_a_plan_without_layers_of_its_own() -> None:
    only = plan(kept={4: (1, 2, 5)})
    with pytest.raises(PlanError, match="no layer of its own choice"):
        only.with_mtp([4], "same-as-last")


# ---- router groups


def test_groups_must_keep_equally_many_and_enough_to_route_to(plan_for: PlanFor, m2: Path) -> None:
    _, layout, fitting = plan_for(m2, 4)
    found = fitting.source
    grouped = replace(layout, num_groups=2, topk_groups=1)
    even = replace(fitting, kept=dict.fromkeys(fitting.kept, (0, 3, 5, 6)))
    even.require_fits(grouped, found)
    uneven = replace(fitting, kept=dict.fromkeys(fitting.kept, (0, 1, 2, 7)))
    with pytest.raises(PlanError, match="layer 0 of the plan keeps 1 to 3 experts per router group") as caught:
        uneven.require_fits(grouped, found)
    assert caught.value.hint == "keep 2 in each of the 2 groups"
    few = replace(fitting, kept=dict.fromkeys(fitting.kept, (0, 1, 4, 5)), top_k=3)
    with pytest.raises(PlanError, match="leaves 2 in each of 2 router groups, and 3 are needed"):
        few.require_fits(replace(grouped, top_k=3), found)
    with pytest.raises(PlanError, match="leaves 1 in each of 4 router groups, and 2 are needed") as caught:
        plans.require_target(replace(layout, num_groups=4, topk_groups=4), criterion="reap", ratio=None, keep=4)
    assert caught.value.hint == "keep at least 8"
