"""What holds on a GPU too; skipped without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantized
from families import FAMILIES, Family, make
from reapkit import criteria, plans
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.formats import decode
from reapkit.layout import resolve
from reapkit.modules import EXPERTS_NAME, StreamedModel, SuspendedForwards
from reapkit.observation import Observation, Run, observe
from reapkit.quantization import read_format
from reapkit.statistics import SUM_NAMES
from streaming import full_model, streamed_logits, token_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

M2_NANO = Path(__file__).parents[1] / "models/m2-nano"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_logits_equal_the_loaded_models_bit_for_bit(dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(M2_NANO)
    layout = resolve(checkpoint, ARCHITECTURES)
    streamed = StreamedModel(checkpoint, layout, device=torch.device("cuda:0"), dtype=dtype)
    full = full_model(M2_NANO, dtype=dtype, experts=EXPERTS_NAME).cuda()
    inputs = [np.random.default_rng(i).integers(3, 2000, (2, 33 + i)) for i in range(3)]
    with SuspendedForwards(streamed, inputs) as forwards:
        forwards.run_layers(lambda layer, number: None)
        for ids_BT, logits_BTV in zip(inputs, forwards.logits(), strict=True):
            with torch.inference_mode():
                assert torch.equal(full(torch.from_numpy(ids_BT).cuda(), use_cache=False).logits, logits_BTV)


def nano_sums(**run: Any) -> Any:
    return observe(M2_NANO, [str(M2_NANO / "data/calibration.jsonl")], run=Run(**run))


def test_sums_on_a_gpu_equal_the_cpus_within_float32_rounding() -> None:
    cpu, gpu = nano_sums(device="cpu", dtype="float32"), nano_sums(device="cuda", dtype="float32")
    for index, layer in cpu.layers.items():
        # A near-tie in a router may fall the other way: at most one routed pair in a thousand.
        moved = np.abs(layer.count_SE - gpu.layers[index].count_SE).sum() / layer.count_SE.sum()
        assert moved < 1e-3, (index, moved)
        for name in SUM_NAMES:
            total = getattr(layer, name).sum()
            assert abs(total - getattr(gpu.layers[index], name).sum()) < 1e-4 * total


def test_bfloat16_on_a_gpu_keeps_the_same_experts_but_for_near_ties() -> None:
    exact, rounded = nano_sums(device="cpu", dtype="float32"), nano_sums(device="cuda", dtype="bfloat16")
    scores = criteria.score(exact.layers, "reap")
    kept = [plans.select(criteria.score(part.layers, "reap"), keep=36) for part in (exact, rounded)]
    for layer, score_E in scores.score_E.items():
        border = np.sort(score_E)[-36]
        for expert in set(kept[0][layer]) ^ set(kept[1][layer]):
            print(json.dumps({"layer": layer, "expert": expert, "distance": abs(score_E[expert] / border - 1)}))
            assert abs(score_E[expert] / border - 1) < 0.03


def test_peak_memory_on_the_device_is_what_the_dry_run_says() -> None:
    run = Run(device="cuda", dtype="float32", activation_budget=64 << 20)
    observation = Observation(M2_NANO, [str(M2_NANO / "data/calibration.jsonl")], run=run, max_length=2048, seed=0)
    expected = observation.estimate().device_bytes
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    observation.run()
    peak = torch.cuda.max_memory_allocated() - before
    print(json.dumps({"expected_bytes": expected, "peak_bytes": peak}))
    assert 0.5 * expected < peak < 1.25 * expected


@pytest.mark.parametrize("scheme", sorted(quantized.SCHEMES))
def test_every_format_has_the_same_values_on_a_gpu(qwen3: Path, tmp_path: Path, scheme: str) -> None:
    checkpoint = Checkpoint.open(quantized.make(qwen3, tmp_path / scheme, scheme))
    form = read_format(checkpoint)
    weights = [info for info in checkpoint.tensors.values() if form.companions(info, checkpoint.tensors)]
    assert weights
    for info in weights:
        for dtype in (torch.float32, torch.bfloat16):
            here, there = (
                decode(checkpoint, info, format=form, dtype=dtype, device=device) for device in ("cpu", "cuda")
            )
            assert torch.equal(here, there.cpu()), (info.name, dtype)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_streams_on_a_gpu_as_it_runs_there_whole(family: Family, tmp_path: Path) -> None:
    whole = make(family, tmp_path / "whole").cuda()
    checkpoint = Checkpoint.open(tmp_path / "whole")
    layout = resolve(checkpoint, ARCHITECTURES)
    streamed = StreamedModel(checkpoint, layout, device=torch.device("cuda:0"), dtype=torch.float32)
    inputs = token_batches()
    for ids_BT, logits_BTV in zip(inputs, streamed_logits(streamed, inputs), strict=True):
        with torch.inference_mode():
            expected = whole(input_ids=torch.from_numpy(ids_BT).cuda(), use_cache=False).logits
        assert (logits_BTV - expected).abs().max() <= 2e-5 * expected.abs().max()
