"""AIMER equals its formula on whole tensors of every kind of layout, and the plan keeps the experts with the lowest."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from families import FAMILIES, Family, make
from reapkit import layout as layouts
from reapkit import plans
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.cli import app
from reapkit.errors import UsageError
from reapkit.magnitudes import score_by_weights
from reapkit.plans import PruningPlan
from tiny import NUM_EXPERTS, load_tensors


def aimer(weights: list[torch.Tensor]) -> float:
    flat = torch.cat([weight.double().flatten() for weight in weights])
    return float(flat.abs().sum() / (math.sqrt(len(flat)) * flat.square().sum().sqrt()))


def score_of(folder: Path) -> Any:
    checkpoint = Checkpoint.open(folder)
    return score_by_weights(checkpoint, layouts.resolve(checkpoint, ARCHITECTURES)).score_E


def test_one_tensor_per_expert(m2: Path) -> None:
    tensors, found = load_tensors(m2), score_of(m2)
    for layer in range(3):
        for expert in range(NUM_EXPERTS):
            mine = [
                tensor
                for name, tensor in tensors.items()
                if f"layers.{layer}.block_sparse_moe.experts.{expert}." in name
            ]
            assert len(mine) == 3
            assert found[layer][expert] == pytest.approx(1 - aimer(mine), rel=1e-6)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in ("Granite-MoE", "DBRX", "gpt-oss")], ids=lambda f: f.name
)
def test_experts_in_stacks_and_in_rows_of_one_matrix(family: Family, tmp_path: Path) -> None:
    make(family, tmp_path / "model")
    found = score_of(tmp_path / "model")
    layer = max(found)
    stacks = [
        tensor.reshape(family.num_experts, -1)
        for name, tensor in load_tensors(tmp_path / "model").items()
        if family.layer_of(name) == layer and re.search(r"experts\.|_linear\.", name) and not name.endswith("bias")
    ]
    assert stacks
    for expert in range(family.num_experts):
        assert found[layer][expert] == pytest.approx(1 - aimer([stack[expert] for stack in stacks]), rel=1e-6)


def test_quantised_weights_are_measured_by_their_values(m2_fp8: Path, tmp_path: Path) -> None:
    found = score_of(m2_fp8)
    assert {index: len(score) for index, score in found.items()} == dict.fromkeys(range(3), NUM_EXPERTS)
    assert all(0 < value < 0.5 for score in found.values() for value in score)


def test_the_command_line_plans_without_text_and_says_where_it_cannot(m2: Path, tmp_path: Path) -> None:
    words = ["plan", str(m2), "--criterion", "aimer", "--ratio", "0.25", "-o", str(tmp_path / "plan.json")]
    assert CliRunner().invoke(app, words).exit_code == 0
    plan, found = PruningPlan.load(tmp_path / "plan.json"), score_of(m2)
    assert (plan.criterion, plan.seed) == ("aimer", None)
    for layer, kept in plan.kept.items():
        assert set(kept) == set(found[layer].argsort()[2:].tolist())
    with pytest.raises(UsageError, match="the criterion 'aimer' scores weights, and not statistics"):
        plans.choose(tmp_path / "s.safetensors", criterion="aimer", ratio=0.25)
