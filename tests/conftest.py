"""Checkpoints and plans that many tests share; the session's are read only, `shutil.copytree` what a test damages."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a Hugging Face library
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tiny
from reapkit import criteria, plans
from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.layout import Identity, MoELayout
from reapkit.plans import PruningPlan


@pytest.fixture(scope="session")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniMax-M2 in float32, 3 layers of 8 experts, top-2."""
    return tiny.make_m2(tmp_path_factory.mktemp("checkpoints") / "m2")


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in float32, MoE in layers 0 and 2."""
    return tiny.make_qwen3(tmp_path_factory.mktemp("checkpoints") / "qwen3")


@pytest.fixture(scope="session")
def m2_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniMax-M2 in the vendor's FP8 layout, whole blocks and half ones."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return tiny.make_fp8(tiny.make_m2(folder / "m2-wide", hidden=256, width=64), folder / "m2-fp8")


PlanFor = Callable[[Path, int], tuple[Checkpoint, MoELayout, PruningPlan]]


@pytest.fixture(scope="session")
def plan_for() -> PlanFor:
    """A checkpoint, its layout and a plan that keeps so many experts, others in every layer."""
    return open_with_plan


def open_with_plan(folder: Path, keep: int, seed: int = 5) -> tuple[Checkpoint, MoELayout, PruningPlan]:
    checkpoint = Checkpoint.open(folder)
    layout = layouts.resolve(checkpoint, ARCHITECTURES)
    scores = criteria.score_at_random(layout.layer_indices, layout.num_experts, seed=seed)
    source = Identity.of(checkpoint, layout)
    kept = plans.select(scores, keep=keep)
    return checkpoint, layout, PruningPlan(source, "random", layout.num_experts, layout.top_k, kept, seed=seed)
