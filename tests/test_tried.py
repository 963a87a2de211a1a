"""What the scripts of docs/reroute.md's tables compute is what they say: held to the package's own elimination and to brute force."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reapkit import plans, prune
from reapkit.elimination import RoutedSample, eliminate, token_weights
from reapkit.selection import Rule

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import repair  # noqa: E402
import variants  # noqa: E402

TOKENS, EXPERTS, TOP_K, WIDTH = 120, 10, 3, 6


@pytest.fixture(scope="module")
def outputs() -> tuple[RoutedSample, np.ndarray, np.ndarray]:
    """A sample with as many candidates as experts, with the vectors behind it and the selection bias."""
    rng = np.random.default_rng(0)
    score_TE, bias_E = rng.random((TOKENS, EXPERTS)), rng.normal(0, 0.2, EXPERTS)
    expert_TC = np.argsort(-(score_TE + bias_E), axis=1)
    out_TCD = rng.normal(size=(TOKENS, EXPERTS, WIDTH))
    rows, columns = np.triu_indices(EXPERTS)
    sample = RoutedSample(
        Rule(EXPERTS, TOP_K, "sigmoid", True, 1.0, 0.0), expert_TC, np.take_along_axis(score_TE, expert_TC, 1),
        (out_TCD @ out_TCD.transpose(0, 2, 1))[:, rows, columns], rng.random(TOKENS) + 0.5, np.zeros(TOKENS),
        np.zeros(TOKENS, dtype=np.int64), np.ones(TOKENS),
    )  # fmt: skip
    return sample, out_TCD, bias_E


def coefficients(sample: RoutedSample, kept: list[int]) -> np.ndarray:
    """By a loop over tokens."""
    found = np.zeros(sample.score_TC.shape)
    for token, experts in enumerate(sample.expert_TC):
        places = [place for place, expert in enumerate(experts) if expert in kept][:TOP_K]
        found[token, places] = sample.score_TC[token, places] / sample.score_TC[token, places].sum()
    return found


def test_the_variants_remove_what_the_criterion_removes_where_the_error_is_the_same(
    outputs: tuple[RoutedSample, np.ndarray, np.ndarray],
) -> None:
    sample, out_TCD, _ = outputs
    target_TD = np.einsum("tc,tcd->td", coefficients(sample, list(range(EXPERTS))), out_TCD)
    vectors = np.concatenate((out_TCD, target_TD[:, None]), 1)
    tokens = variants.Tokens(
        sample.expert_TC, sample.score_TC, vectors @ vectors.transpose(0, 2, 1), 1 / sample.stream_sq_T
    )
    order = variants.eliminate(tokens, num_experts=EXPERTS, top_k=TOP_K, removed=6)
    assert order == list(eliminate(sample, token_weights(sample, "residual"), keep=4).order)


def test_the_rescaling_is_the_least_squares_solution_over_outputs(
    outputs: tuple[RoutedSample, np.ndarray, np.ndarray],
) -> None:
    sample, out_TCD, bias_E = outputs
    kept = [0, 2, 3, 5, 6, 9]
    layer = repair.Layer(sample, kept, bias_E)
    everyone = np.arange(TOKENS)
    scale_E = repair.rescale(layer, everyone)
    weight = np.sqrt(token_weights(sample, "residual"))[:, None]
    per_candidate = coefficients(sample, kept)[:, :, None] * out_TCD
    columns = [(weight * (per_candidate * (sample.expert_TC == expert)[:, :, None]).sum(1)).ravel() for expert in kept]
    own = weight * np.einsum("tc,tcd->td", coefficients(sample, list(range(EXPERTS))), out_TCD)
    expected = np.linalg.lstsq(np.stack(columns, 1), own.ravel(), rcond=None)[0]
    assert np.allclose(scale_E[kept], expected, rtol=1e-4) and (np.delete(scale_E, kept) == 1).all()
    before = layer.error(everyone, bias_E).sum()
    assert repair.rescaled_error(layer, everyone, np.ones(EXPERTS)) == pytest.approx(before)
    assert repair.rescaled_error(layer, everyone, scale_E) < before


def test_a_bias_moves_only_where_that_lowers_the_error(outputs: tuple[RoutedSample, np.ndarray, np.ndarray]) -> None:
    sample, _, bias_E = outputs
    layer = repair.Layer(sample, [0, 2, 3, 5, 6, 9], bias_E)
    everyone = np.arange(TOKENS)
    moved_E = repair.move_bias(layer, everyone)
    assert layer.error(everyone, moved_E).sum() < layer.error(everyone, bias_E).sum()
    assert (moved_E[[1, 4, 7, 8]] == bias_E[[1, 4, 7, 8]]).all()


def test_repairs_change_the_scales_and_biases_that_they_mean_and_nothing_else(tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    plan = plans.plan(repair.MODEL, criterion="random", keep=40)
    prune(repair.MODEL, plan, pruned)
    kept = dict(plan.kept)
    expert, place = kept[3][7], 7
    found = {
        "rescale": {layer: np.where((layer == 3) & (np.arange(48) == expert), 2.0, 1.0) for layer in range(6)},
        "bias": {layer: np.arange(48.0) for layer in range(6)},
    }
    for name in found:
        out = repair.repaired(pruned, tmp_path / name, kept, {name: found[name]})
        changed = {}
        for path in sorted(out.glob("*.safetensors")):
            before, after = load_file(pruned / path.name), load_file(path)
            assert before.keys() == after.keys()
            changed |= {
                key: (before[key], after[key])
                for key in before
                if not torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))
            }
        if name == "rescale":
            assert list(changed) == [f"model.layers.3.block_sparse_moe.experts.{place}.w2.weight_scale_inv"]
            assert all(torch.equal(2 * before, after) for before, after in changed.values())
        else:
            assert len(changed) == 6
            for key, (_, after) in changed.items():
                assert after.tolist() == list(kept[int(key.split(".")[2])])


@pytest.mark.parametrize("script", [repair, variants], ids=["repair", "variants"])
def test_the_page_holds_the_tables_of_the_recorded_runs(script: ModuleType) -> None:
    name = script.__name__
    results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    assert script.table(results) in (ROOT / "docs/reroute.md").read_text(encoding="utf-8"), (
        f"python benchmarks/{name}.py --table benchmarks/results/{name}.json"
    )
