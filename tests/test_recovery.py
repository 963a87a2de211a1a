"""A pruned checkpoint says by its router which experts it kept, whatever its format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from families import FAMILIES, make
from reapkit import plans, prune
from reapkit.cli import app
from reapkit.errors import PlanError
from reapkit.plans import PruningPlan
from reapkit.recovery import recover
from streaming import with_tensors
from tiny import read_json, write_json


def pruned(folder: Path, out: Path, **options: object) -> PruningPlan:
    plan = plans.plan(folder, criterion="random", ratio=0.25, seed=3)
    prune(folder, plan, out, **options)  # type: ignore[arg-type]
    return PruningPlan.load(out / "reapkit/plan.json")


@pytest.mark.parametrize("name", ["m2", "m2_fp8", "qwen3"])
def test_what_was_kept_is_recovered(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    parent: Path = request.getfixturevalue(name)
    plan = pruned(parent, tmp_path / "out")
    found = recover(parent, tmp_path / "out")
    assert (found.kept, found.source, found.criterion) == (plan.kept, plan.source, "recovered")


def test_it_is_recovered_from_another_format_and_applied_to_a_third(m2_fp8: Path, tmp_path: Path) -> None:
    plan = pruned(m2_fp8, tmp_path / "out", dequantize=True)
    found = recover(m2_fp8, tmp_path / "out")
    assert found.kept == plan.kept
    manifest = prune(m2_fp8, found, tmp_path / "again")
    assert manifest.after.num_experts == 6


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in ("ERNIE-4.5", "LongCat-Flash", "DeepSeek-V3")], ids=lambda f: f.name
)
def test_biases_along_another_axis_zero_experts_and_mtp_layers_are_understood(family, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(family, tmp_path / "parent", mtp=family.has_mtp)
    plan = pruned(tmp_path / "parent", tmp_path / "out")
    assert recover(tmp_path / "parent", tmp_path / "out").kept == plan.kept
    if family.has_mtp:
        without = plans.plan(tmp_path / "parent", criterion="random", ratio=0.25)
        prune(tmp_path / "parent", without, tmp_path / "dropped", mtp="drop")
        assert recover(tmp_path / "parent", tmp_path / "dropped").drop_mtp


def test_a_router_that_was_trained_on_is_named(m2: Path, tmp_path: Path) -> None:
    pruned(m2, tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.gate.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][2, 0] += 1

    changed = with_tensors(tmp_path / "out", tmp_path / "changed", change)
    with pytest.raises(
        PlanError, match=r"the router of layer 1 has a row \(expert 2 of 6\) that is none of the parent's 8"
    ) as caught:
        recover(m2, changed)
    assert "merged" in str(caught.value.hint)


def test_experts_that_routers_cannot_tell_apart_are_named(m2: Path, tmp_path: Path) -> None:
    parts = ("gate.weight", "e_score_correction_bias")

    def alike(tensors: dict[str, torch.Tensor]) -> None:
        for part in parts:
            name = f"model.layers.1.block_sparse_moe.{part}"
            tensors[name] = tensors[name].clone()
            tensors[name][5] = tensors[name][3]

    parent = with_tensors(m2, tmp_path / "parent", alike)
    plan = plans.plan(parent, criterion="random", ratio=0.25)
    for kept, works in (((0, 1, 2, 4, 6, 7), True), ((0, 1, 3, 4, 6, 7), False), ((0, 1, 2, 3, 5, 7), True)):
        out = tmp_path / str(kept)
        described = plan.to_json() | {"kept": {**plan.to_json()["kept"], "1": list(kept)}}
        prune(parent, PruningPlan.from_json(described, origin="test"), out)
        if works:
            assert recover(parent, out).kept[1] == kept
        else:
            with pytest.raises(
                PlanError, match="the experts 3, 5 of layer 1 have the same row in the parent's router, and 1 of them"
            ):
                recover(parent, out)


def test_another_family_is_no_parent(m2: Path, qwen3: Path, tmp_path: Path) -> None:
    pruned(m2, tmp_path / "out")
    with pytest.raises(PlanError, match=r"\(MiniMax-M2, 3 layers\) is not pruned from .* \(Qwen3-MoE, 3 layers\)"):
        recover(qwen3, tmp_path / "out")


def test_the_command_line_recovers_a_plan(m2: Path, tmp_path: Path) -> None:
    plan = pruned(m2, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/reapkit")
    (tmp_path / "out/reapkit.json").unlink()
    words = ["plan", "--recover", str(m2), str(tmp_path / "out"), "-o", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "6 of 8 experts stayed in each of 3 layers" in result.stderr
    assert PruningPlan.load(tmp_path / "plan.json").kept == plan.kept
    described = json.loads(CliRunner().invoke(app, [*words, "--json", "--dry-run"]).stdout)
    assert described["plan"] is None and described["num_kept"] == 6
    config = read_json(tmp_path / "out/config.json")
    assert config["num_local_experts"] == 6
    write_json(tmp_path / "out/config.json", config)
