"""The study, reduced to what a CPU does in seconds: its shortcuts compute what written checkpoints do, its page follows from its cells."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples/m2_nano")]

import study  # noqa: E402
import study_page  # noqa: E402
from reapkit import compare, plans, prune  # noqa: E402
from reapkit.observation import Run  # noqa: E402
from study import Cell, Evaluator, Masks, Study  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two criteria and a merger at one ratio, two short prompts of two domains."""
    small = Study(
        tmp_path_factory.mktemp("study"), ratios=("0.25",), seeds=(0,), methods=("reap", "random", "hc-smoe"), calibrations=("all",),
        share=0.03, domains=("arithmetic", "lookup"), prompts=2, documents=6, tokens=200, workers=2,
    )  # fmt: skip
    assert study.run(small)
    return small


@pytest.fixture(scope="module")
def evaluator(finished: Study) -> Evaluator:
    made = Evaluator(finished)
    made.fidelity(made.original, None)
    return made


def test_a_reduced_study_finds_its_cells_and_does_not_run_them_again(
    finished: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = study.read_cells(finished.cells_file)
    assert {cell.method for cell in cells} == {"original", "reap", "random", "hc-smoe"}
    for cell, record in cells.items():
        assert all(record["exact"][name]["count"] == 2 for name in finished.domains)
        kl = record["kl"]["overall"]["value"]
        assert kl == 0 if cell.method == "original" else 0 < kl < 20
        assert cell.method == "original" or 0 < record["subspace"]["effective_rank"] < 4
    before = finished.cells_file.read_text()
    with finished.cells_file.open("a") as stream:
        stream.write('{"calibration": "all", "se')  # where a run was killed
    assert study.run(finished) and finished.cells_file.read_text().startswith(before)
    assert "0 are left" in capsys.readouterr().out


def test_masked_variants_in_one_batch_compute_what_their_written_checkpoints_do(
    finished: Study, evaluator: Evaluator, tmp_path: Path
) -> None:
    chosen = [plans.plan(study.MODEL, criterion="random", ratio=0.5, seed=seed) for seed in (1, 2)]
    kept = [{layer: list(experts) for layer, experts in plan.kept.items()} for plan in chosen]
    both = Masks.of(kept, num_experts=48, device="cpu")
    together = evaluator.replies(evaluator.original, ["arithmetic"], both)["arithmetic"]
    for number, plan in enumerate(chosen):
        prune(study.MODEL, plan, tmp_path / str(number))
        written, _ = evaluator.load(tmp_path / str(number))
        assert evaluator.replies(written, ["arithmetic", "lookup"], None)["arithmetic"] == [together[number]]
        alone = evaluator.fidelity(evaluator.original, Masks.of([kept[number]], num_experts=48, device="cpu"))
        found = evaluator.fidelity(written, None)
        for measure in ("kl", "top1"):
            assert found[measure]["overall"]["value"] == pytest.approx(alone[measure]["overall"]["value"], rel=1e-3)
        assert found["subspace"] == pytest.approx(alone["subspace"], rel=1e-3)
    assert together[0] != together[1]


def test_kl_and_top1_are_those_of_compare(finished: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in study.read_rows(study.HELDOUT) if row["domain"] in ("arithmetic", "lookup")][:5]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plans.plan(study.MODEL, criterion="random", ratio=0.25, seed=1)
    prune(study.MODEL, plan, tmp_path / "pruned")
    wanted = compare(study.MODEL, tmp_path / "pruned", [str(text)], run=Run(device="cpu", dtype="float32"))
    monkeypatch.setattr(study, "HELDOUT", text)
    evaluator = Evaluator(Study(tmp_path, documents=None, prompts=1))
    evaluator.fidelity(evaluator.original, None)
    masks = Masks.of([{layer: list(kept) for layer, kept in plan.kept.items()}], num_experts=48, device="cpu")
    found = evaluator.fidelity(evaluator.original, masks)
    for measure in ("kl", "top1"):
        figure = getattr(wanted.overall, measure)
        assert found[measure]["overall"]["value"] == pytest.approx(figure.value, rel=1e-3)
        # compare counts one degree of freedom less.
        assert found[measure]["overall"]["standard_error"] == pytest.approx(
            figure.standard_error * math.sqrt(4 / 5), rel=1e-2
        )


def test_scores_are_those_of_the_models_own_scorer(evaluator: Evaluator) -> None:
    from score import score_model

    rows = [row for domain in evaluator.rows.values() for row in domain]
    wanted = score_model(evaluator.original, evaluator.tokenizer, rows, limit=None, batch_size=64)
    with ThreadPoolExecutor(1) as pool:
        for domain in evaluator.rows:
            found = evaluator.score(domain, evaluator.replies(evaluator.original, [domain], None)[domain][0], pool)
            assert found["right"] / found["count"] == wanted[domain]["value"]


def test_all_experts_at_once_compute_what_the_chosen_do(evaluator: Evaluator) -> None:
    experts = evaluator.original.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 256, generator=generator)
    gate, chosen = torch.rand(50, 48, generator=generator).topk(4)
    wanted = torch.zeros_like(hidden)
    for token in range(50):
        for weight, expert in zip(gate[token], chosen[token], strict=True):
            one, other = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            wanted[token] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(one) * other))
    torch.testing.assert_close(study.dense_experts(experts, hidden, chosen, gate), wanted, rtol=1e-4, atol=1e-5)
    ids = torch.randint(3, 2000, (2, 9), generator=generator)
    with torch.inference_mode():
        before = evaluator.original(ids).logits
        evaluator.original.set_experts_implementation(study.DENSE)
        torch.testing.assert_close(evaluator.original(ids).logits, before, rtol=1e-3, atol=1e-3)
        evaluator.original.set_experts_implementation("grouped_mm")


def test_a_reply_loops_when_its_end_is_one_block_three_times_over() -> None:
    assert (
        study.loops([5, 1, 2, 1, 2, 1, 2])
        and study.loops([7, 7, 7])
        and study.loops([9, *range(16)] + [*range(16)] * 2)
    )
    assert (
        not study.loops([1, 2, 1, 2, 3])
        and not study.loops([7, 7])
        and not study.loops([*range(17)] * 3)
        and not study.loops([])
    )


def test_the_space_of_outputs_is_as_wide_as_it_was_made() -> None:
    """Outputs on three axes with variances 4, 4 and 1 around a mean: 81 / 33 dimensions by participation."""
    at = np.sqrt(3.0) * np.array([[2, 0, 0], [-2, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1]])
    out_ND = torch.from_numpy(at) + torch.tensor([5.0, 0.0, -3.0])
    found = study.subspace(6, out_ND.sum(0), out_ND.T @ out_ND)
    assert found["spread"] == pytest.approx(9) and found["participation"] == pytest.approx(81 / 33)
    assert found["effective_rank"] == pytest.approx(math.exp(-(8 / 9) * math.log(4 / 9) - math.log(1 / 9) / 9))


# ---- the page


def record(
    method: str, seed: int, *, kl: float, right: int, kind: str = "pruned", ratio: str = "0.25", **changes: Any
) -> dict[str, Any]:
    figure = {"value": kl, "standard_error": 0.01}
    exact = {name: {"count": 10, "right": right, "unended": 0, "looping": 1} for name in ("python", "lookup")}
    space = {"participation": 1.0, "effective_rank": 0.9, "spread": 0.8 if kind == "pruned" else 0.5}
    return {
        "calibration": "all", "seed": seed, "method": method, "ratio": ratio, "kind": kind, "exact": exact,
        "kl": {"overall": figure, "stdlib": figure}, "top1": {"overall": figure}, "subspace": space, **changes,
    }  # fmt: skip


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    settings = {"device": "cpu", "share": 0.5, "prompts": None, "documents": None}
    original = record("original", 0, kl=0.0, right=10, ratio="0", calibration="-", settings=settings)
    rows = [("reap", 0.4, 6), ("reroute residual", 0.1, 9), ("frequency", 0.3, 2)]
    pruned = [
        record(name, seed, kl=kl + seed / 100, right=right + seed % 2) for name, kl, right in rows for seed in range(3)
    ]
    merged = [record("ream", seed, kl=0.6 + seed / 100, right=3, kind="merged") for seed in range(3)]
    return [original, *pruned, *merged, {**record("aimer", 0, kl=0, right=0), "not_run": "it failed"}]


def test_figures_join_what_seeds_and_prompts_leave_open(cells: list[dict[str, Any]]) -> None:
    found = study_page.Results(cells).entries["all", "reap", "0.25"]
    kl, exact = found.text("kl"), found.exact("python")
    assert kl.value == pytest.approx(0.41) and kl.error == pytest.approx(math.sqrt(0.01**2 / 3 + 0.01**2))
    mean = 19 / 30
    assert exact.value == pytest.approx(mean)
    assert exact.error == pytest.approx(math.sqrt((0.01 / 3) / 3 + mean * (1 - mean) / 10))
    assert found.exact().error == pytest.approx(math.sqrt((0.01 / 3) / 3 + 2 * mean * (1 - mean) / 10 / 4))
    assert found.replies("looping") == pytest.approx(0.1)


def test_the_page_says_who_wins_who_loses_and_what_did_not_run(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    study_page.render(cells, tmp_path / "results/study.json", tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert "the smallest KL has reroute residual (0.1100" in page and "REAP is 3 of 4 by KL" in page
    assert "by KL; more than REAP, beyond the spread, solve: reroute residual." in page
    assert (
        "by reap: where the calibration sample matters most to it, python is solved at 0.600, 0.700, 0.600 by sample"
        in page
    )
    row = next(
        line for line in page.splitlines() if line.startswith("| 25 % | reroute residual | 0.1100 ± 0.0115 | 0.4100")
    )
    assert row.endswith("3.73 times smaller | 0.933 ± 0.065 | 0.633 ± 0.113 | none | none | none | none |")
    assert "REAP (0.4100 ± 0.0115) loses by KL, beyond the spread, to frequency (0.3100 ± 0.0115)" in page
    assert "below every pruned one: ream" in page and "Not run: aimer: it failed" in page and "pilot" not in page
    before = {name: (tmp_path / name).read_bytes() for name in ("study.md", *study_page.PLOTS)}
    study_page.render(None, tmp_path / "results/study.json", tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_the_page_names_domains_that_the_challenger_loses(cells: list[dict[str, Any]]) -> None:
    right = {"reap": (4, 6), "reroute residual": (0, 10), "frequency": (10, 10)}
    for cell in cells:
        for domain, number in zip(("python", "lookup"), right.get(cell["method"], ()), strict=False):
            cell["exact"][domain]["right"] = number
        if cell["method"] == "reroute residual":
            figures = {"overall": 0.5, "stdlib": 0.9}
            cell["kl"] = {name: {"value": value, "standard_error": 0.01} for name, value in figures.items()}
    page = study_page.page(study_page.Results(cells))
    row = next(line for line in page.splitlines() if "times larger" in line)
    assert "more than REAP, beyond the spread, solve: frequency." in page
    assert "| 1.22 times larger |" in row and row.endswith("| python | lookup | stdlib | frequency, reap |")


def test_differences_are_paired_by_seed_and_held_to_what_three_seeds_can_tell(cells: list[dict[str, Any]]) -> None:
    """0.02, 0.03 and 0.04 apart: a mean of 0.03 with an error of 0.01 / sqrt(3), t = 5.2, where two degrees of freedom ask for 4.30."""
    entries = study_page.Results(cells).entries
    base = entries["all", "reap", "0.25"]
    for factor, is_beyond in ((1.0, True), (2.0, False)):
        steps = [0.03 - factor * 0.01, 0.03, 0.03 + factor * 0.01]
        records = [
            {**one, "kl": {"overall": {"value": one["kl"]["overall"]["value"] + step}}}
            for one, step in zip(base.records, steps, strict=True)
        ]
        apart = study_page.kl_difference(study_page.Entry("all", "other", "0.25", tuple(records)), base)
        assert apart is not None and apart.freedom == 2
        assert (apart.value, apart.error) == pytest.approx((0.03, factor * 0.01 / math.sqrt(3)))
        assert apart.is_beyond == is_beyond  # of 5.2 and 2.6 errors, both more than 1.96


def test_differences_of_prompts_solved_count_seeds_and_prompts(cells: list[dict[str, Any]]) -> None:
    """Shares of 0.6, 0.7, 0.6 against 0.2, 0.2, 0.2 of ten prompts."""
    entries = study_page.Results(cells).entries
    base, other = entries["all", "reap", "0.25"], entries["all", "frequency", "0.25"]
    for record in other.records:
        record["exact"]["python"]["right"] = 2
    apart = study_page.exact_difference(base, other, "python")
    seeds, prompts = (0.01 / 3) / 3, (19 / 30 * 11 / 30 + 0.2 * 0.8) / 10
    assert apart is not None and apart.value == pytest.approx(13 / 30)
    assert apart.error == pytest.approx(math.sqrt(seeds + prompts))
    assert apart.freedom == pytest.approx(2 * ((seeds + prompts) / seeds) ** 2)
    assert apart.is_beyond  # 2.15 errors, at many degrees of freedom
    alone = study_page.Entry("all", "reap", "0.25", base.records[:1])
    assert study_page.kl_difference(alone, other) is None
    single = study_page.exact_difference(
        alone, study_page.Entry("all", "frequency", "0.25", other.records[:1]), "python"
    )
    assert single is not None and math.isinf(single.freedom) and single.error == pytest.approx(0.2)
    assert single.is_beyond  # 2.0 errors, and the prompts' chance is known


def test_a_study_with_cells_missing_says_so(cells: list[dict[str, Any]]) -> None:
    assert "missing" not in study_page.page(study_page.Results(cells))
    assert "1 of 12 cells missing" in study_page.page(study_page.Results(cells[:1] + cells[2:]))


def test_a_study_of_fewer_prompts_calls_itself_a_pilot(cells: list[dict[str, Any]]) -> None:
    cells[0]["settings"]["prompts"] = 10
    assert "**This is a pilot**" in study_page.page(study_page.Results(cells))


def test_the_committed_page_is_what_the_committed_results_give(tmp_path: Path) -> None:
    study_page.render(None, ROOT / "benchmarks/results/study.json", tmp_path)
    for name in ("study.md", *study_page.PLOTS):
        assert (tmp_path / name).read_bytes() == (ROOT / "docs" / name).read_bytes(), (
            f"{name}: python benchmarks/study.py render"
        )


def test_earlier_cells_are_taken_over_and_unknown_methods_refused(finished: Study, tmp_path: Path) -> None:
    words = ["run", "--out", str(tmp_path), "--resume", str(finished.cells_file), "--device", "cpu", "--minutes", "0"]
    with pytest.raises(SystemExit, match="there is no method 'reep'"):
        study.main([*words, "--methods", "reep"])
    assert study.read_cells(tmp_path / "cells.jsonl").keys() == study.read_cells(finished.cells_file).keys()
    assert Cell("all", 0, "reap", "0.25") in study.read_cells(tmp_path / "cells.jsonl")
