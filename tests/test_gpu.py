"""What holds on a GPU too; skipped without one."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.minimax_m2.modeling_minimax_m2 import apply_rotary_pos_emb

import quantized
from families import FAMILIES, Family, make
from reapkit import criteria, observation, plans
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.errors import DataError
from reapkit.experts import RoutedPairs, _grouped_linear, _routed
from reapkit.formats import decode
from reapkit.fusion import fused_kernels
from reapkit.layout import resolve
from reapkit.modules import EXPERTS_NAME, StreamedModel, SuspendedForwards
from reapkit.observation import Observation, Run, observe
from reapkit.quantization import read_format
from reapkit.rerouting import Reroute, RerouteRecorder, _turns
from reapkit.statistics import SUM_NAMES, LayerStatistics
from reapkit.sums import RoutedSums
from streaming import full_model, streamed_logits, token_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

kernels: Any = fused_kernels(torch.device("cuda")) if torch.cuda.is_available() else None

M2_NANO = Path(__file__).parents[1] / "models/m2-nano"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_logits_equal_the_loaded_models_bit_for_bit(dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(M2_NANO)
    layout = resolve(checkpoint, ARCHITECTURES)
    streamed = StreamedModel(checkpoint, layout, device=torch.device("cuda:0"), dtype=dtype, plain=True)
    full = full_model(M2_NANO, dtype=dtype, experts=EXPERTS_NAME).cuda()
    inputs = [np.random.default_rng(i).integers(3, 2000, (2, 33 + i)) for i in range(3)]
    with SuspendedForwards(streamed, inputs) as forwards:
        forwards.run_layers(lambda layer, number: None)
        for ids_BT, logits_BTV in zip(inputs, forwards.logits(), strict=True):
            with torch.inference_mode():
                assert torch.equal(full(torch.from_numpy(ids_BT).cuda(), use_cache=False).logits, logits_BTV)


# ---- fused kernels, on fresh random values in every run


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the largest value: a rounding or two in the dtype.
# What sums do not look at.
UNSEEN = (torch.empty(0), torch.empty(0), torch.empty(0), lambda hidden, places, experts: hidden)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def routed_pairs(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts and places of pairs sorted by expert, and the coefficients."""
    chosen = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    expert_P, order_P = torch.sort(chosen.reshape(-1), stable=True)
    return expert_P, order_P, torch.rand(len(order_P), device="cuda")


@pytest.mark.parametrize("width", [96, 3072, 6144])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathering_swiglu_and_norms_equal_plain_torch(dtype: torch.dtype, width: int) -> None:
    hidden_ND = torch.randn(77, width, device="cuda").to(dtype)
    token_P = torch.randint(77, (301,), device="cuda")
    assert torch.equal(kernels.gather(hidden_ND, token_P), hidden_ND[token_P])
    gate, up = hidden_ND.chunk(2, -1)
    ours = kernels.swiglu(hidden_ND)
    assert (ours - torch.nn.functional.silu(gate) * up).abs().max() <= ROUNDING[dtype] * ours.abs().max()
    norm = LlamaRMSNorm(width, eps=1e-6).to("cuda", dtype)
    norm.weight.data.normal_()
    ours = kernels.rms_norm(hidden_ND.view(7, 11, width), norm.weight, 1e-6)
    assert (ours - norm(hidden_ND.view(7, 11, width))).abs().max() <= ROUNDING[dtype] * ours.abs().max()


@pytest.mark.parametrize("turned", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotating_heads_equals_transformers_own(dtype: torch.dtype, rows: int, turned: int) -> None:
    q, k = (torch.randn(3, 17, heads, 128, device="cuda").to(dtype).transpose(1, 2) for heads in (6, 2))
    angles = torch.rand(rows, 17, turned, device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert (kernels.rotate(ours, cos, sin) - theirs).abs().max() <= ROUNDING[dtype] * theirs.abs().max()


@pytest.mark.parametrize("width", [96, 3072, 6144])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combining_equals_a_sum_in_float64(dtype: torch.dtype, width: int) -> None:
    _, order_P, gate_P = routed_pairs(50, 16, 4)
    out_PD = torch.randn(len(order_P), width, device="cuda").to(dtype)
    ours_ND, norm_P = kernels.combine(out_PD, gate_P, order_P, top_k=4, dtype=dtype)
    wide = torch.zeros_like(out_PD, dtype=torch.float64)
    wide[order_P] = out_PD.double() * gate_P.double()[:, None]
    expected_ND = wide.view(50, 4, width).sum(1)
    assert (ours_ND.double() - expected_ND).abs().max() <= ROUNDING[dtype] * expected_ND.abs().max()
    assert torch.allclose(norm_P.double(), out_PD.double().norm(dim=-1), rtol=1e-6)


@pytest.mark.parametrize("width", [96, 3072, 6144])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_and_turns_of_sampled_tokens_equal_plain_torch_in_float64(dtype: torch.dtype, width: int) -> None:
    before_MD, after_ND = (
        torch.randn(5, width, device="cuda").to(dtype),
        torch.randn(31, width, device="cuda").to(dtype),
    )
    place_M = torch.tensor([3, 0, 30, 7, 7], device="cuda")
    after_ND[3] = before_MD[0] * 2
    before_MD[4] = 0
    before, after = before_MD.double(), after_ND[place_M].double()
    exact = before.square().sum(-1), 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert exact[1][[0, 4]].tolist() == pytest.approx([0, 1])
    for computed in (kernels.turns(before_MD, after_ND, place_M), _turns(before_MD, after_ND, place_M)):
        for ours, wanted in zip(computed, exact, strict=True):
            assert torch.allclose(ours.double(), wanted, rtol=1e-6, atol=1e-6)


def in_fp8(values_MN: Tensor) -> Tensor:
    """Rounded to FP8 (E4M3) with a scale for each 128 values of a row, and back: what `kernels.quantize` should make of them."""
    groups = values_MN.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).double() * scale.double()).flatten(1)


def weights_in_fp8(*shape: int) -> tuple[Tensor, Tensor]:
    """Weights [E, O, D], and the scales of their blocks of 128 x 128."""
    weight = torch.randn(*shape, device="cuda").mul(60).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight, (torch.rand(shape[0], shape[1] // 128, shape[2] // 128, device="cuda") + 0.5) / 1000


def widened(weight: Tensor, scale: Tensor) -> Tensor:
    """The values that both stand for, in float64."""
    return weight.double() * scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_what_is_not_finite_is_found_wherever_it_lies(dtype: torch.dtype) -> None:
    values = torch.randn(5, 70, 1003, device="cuda").mul(3).to(dtype)
    assert not kernels.find_odd(values).any()
    for place, odd in ((0, "nan"), (-1, "-inf")):
        if dtype == torch.float8_e4m3fn:  # which has no infinity
            odd = "nan"
        changed = values.clone()
        changed[3].view(-1)[place] = float(odd)
        assert kernels.find_odd(changed).tolist() == [number == 3 for number in range(5)]


@pytest.mark.parametrize("width", [128, 384, 6144])
def test_rounding_to_fp8_gives_each_128_values_of_a_row_a_scale_of_their_own(width: int) -> None:
    values = (torch.randn(33, width, device="cuda") * torch.logspace(-6, 6, 33, device="cuda")[:, None]).bfloat16()
    values[3] = 0
    token_P = torch.randint(33, (57,), device="cuda")
    for taken in (None, token_P):
        fp8, scale = kernels.quantize(values, taken)
        wanted = in_fp8(values if taken is None else values[taken])
        back = fp8.double() * scale.T.double().repeat_interleave(128, 1)
        assert torch.allclose(back, wanted, rtol=0.07, atol=1e-12)
        # But for values in the middle between two that FP8 has, which a last bit of the division decides.
        assert ((back - wanted).abs() > 1e-6 * wanted.abs()).double().mean() < 2e-3


@pytest.mark.parametrize(("hidden", "inner", "experts"), [(256, 128, 48), (512, 384, 5)])
def test_experts_in_fp8_equal_a_product_in_float64_of_the_same_rounded_values(
    hidden: int, inner: int, experts: int
) -> None:
    gate_up, gate_up_scale = weights_in_fp8(experts, 2 * inner, hidden)
    down, down_scale = weights_in_fp8(experts, hidden, inner)
    wide_gate_up, wide_down = widened(gate_up, gate_up_scale), widened(down, down_scale)
    hidden_ND = torch.randn(517, hidden, device="cuda").bfloat16()
    expert_P, order_P, _ = routed_pairs(517, experts - 1, 4)  # the last one gets none
    token_P = order_P // 4
    ours_PD = kernels.experts_fp8(hidden_ND, token_P, expert_P, gate_up, gate_up_scale, down, down_scale)
    alone_PD = kernels.experts_fp8(hidden_ND[token_P], None, expert_P, gate_up, gate_up_scale, down, down_scale)
    assert torch.equal(ours_PD, alone_PD)
    inner_P = torch.einsum("pd,pod->po", in_fp8(hidden_ND)[token_P], wide_gate_up[expert_P])
    gate, up = inner_P.chunk(2, 1)
    wanted_PD = torch.einsum("pi,pdi->pd", in_fp8((torch.nn.functional.silu(gate) * up).float()), wide_down[expert_P])
    assert not ours_PD.isnan().any()
    error_P = (ours_PD.double() - wanted_PD).norm(dim=-1) / wanted_PD.norm(dim=-1)
    print(json.dumps({"mean": float(error_P.mean()), "max": float(error_P.max())}))
    # A rounding to bfloat16, and values that fall to another of FP8's in between: a step of 6 % at most. A wrong row or scale errs by 1.
    assert error_P.max() < 0.06 and error_P.mean() < 0.02


def test_experts_in_fp8_whose_scales_are_the_smallest_make_zeros_of_zeros_and_nothing_that_is_not_finite() -> None:
    gate_up, gate_up_scale = weights_in_fp8(3, 256, 256)
    down, down_scale = weights_in_fp8(3, 256, 128)
    down_scale[1] = 1e-20  # what `StreamedModel` makes of zeros
    gate_up_scale[2] = 1e-20
    hidden_ND = torch.randn(60, 256, device="cuda").bfloat16()
    hidden_ND[::2] = 0
    expert_P = torch.arange(3, device="cuda").repeat_interleave(20)
    out_PD = kernels.experts_fp8(hidden_ND, None, expert_P, gate_up, gate_up_scale, down, down_scale)
    assert out_PD.isfinite().all()
    assert not out_PD[::2].any()
    assert out_PD[1:20:2].any() and out_PD[20:].abs().max() < 1e-9


@pytest.mark.parametrize("is_fp8", [False, True], ids=["bfloat16", "float8"])
@pytest.mark.parametrize(("hidden", "inner", "experts"), [(3072, 1536, 32), (256, 128, 48), (4096, 2048, 16)])
def test_an_experts_output_has_the_same_bits_whatever_rows_are_beside_it(
    hidden: int, inner: int, experts: int, is_fp8: bool
) -> None:
    gate_up, gate_up_scale = weights_in_fp8(experts, 2 * inner, hidden)
    down, down_scale = weights_in_fp8(experts, hidden, inner)

    def compute(hidden_PD: Tensor, expert_P: Tensor) -> Tensor:
        if is_fp8:
            result: Tensor = kernels.experts_fp8(hidden_PD, None, expert_P, gate_up, gate_up_scale, down, down_scale)
            return result
        inner_PI = kernels.swiglu(_grouped_linear(hidden_PD, gate_up.bfloat16(), expert_P, "gate_up_proj"))
        return _grouped_linear(inner_PI, down.bfloat16(), expert_P, "down_proj")

    expert_P, _, _ = routed_pairs(4096, experts, 4)
    hidden_PD = (torch.randn(len(expert_P), hidden, device="cuda") / 60).bfloat16()
    whole_PD = compute(hidden_PD, expert_P)
    assert whole_PD.isfinite().all() and whole_PD.any()
    for share in (0.005, 0.06, 0.3):
        taken_P = torch.rand(len(expert_P), device="cuda") < share
        assert torch.equal(compute(hidden_PD[taken_P], expert_P[taken_P]), whole_PD[taken_P])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8", "float32"])
def test_a_sample_of_tokens_has_the_same_bits_in_any_number_of_waves(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(observation.TOKENS_PER_BATCH, "cuda", 2048)
    samples = []
    for budget in (1 << 30, 16 << 20):
        run = Run(device="cuda", dtype=dtype, activation_budget=budget)
        watched = Observation(
            M2_NANO, [str(M2_NANO / "data/calibration.jsonl")], run=run, max_length=2048, seed=0, reroute=Reroute(3000)
        )
        print(json.dumps({"waves": [len(wave) for wave in watched.waves]}))
        assert (len(watched.waves) > 1) == (budget < 1 << 30)
        samples.append(tmp_path / f"{budget}.safetensors")
        watched.run(sample=samples[-1])
    assert samples[0].read_bytes() == samples[1].read_bytes()


class InTurn:
    """An executor that does everything at once: what waits for the device is then known to be in a layer, and not the loader beside it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any, *values: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*values))
        return done

    def shutdown(self, **_: Any) -> None:
        pass

    map = staticmethod(map)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_experts_sums_and_a_sample_of_tokens_do_not_wait_for_the_device(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch's kernels are sent off while those of the one before it run."""

    def without_waiting(*args: Any, **options: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return _routed(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("reapkit.experts._routed", without_waiting)
    monkeypatch.setattr("reapkit.modules._Readers", InTurn)
    data, run = [str(M2_NANO / "data/calibration.jsonl")], Run(device="cuda", dtype=dtype)
    watched = Observation(M2_NANO, data, run=run, max_length=2048, seed=0, reroute=Reroute(3000))
    assert len(watched.run(sample=tmp_path / "sample").layers) == 6
    monkeypatch.setattr(RerouteRecorder, "_rank", lambda self, choice_ME, *_: choice_ME.cpu())
    with pytest.raises(RuntimeError, match="synchronizing"):
        watched.run(sample=tmp_path / "again")


def test_adding_pairs_equals_the_plain_sums_twice_to_the_same_bits() -> None:
    rows, experts = 8, 16
    expert_P, order_P, gate_P = routed_pairs(5000, experts, 4)
    pairs = RoutedPairs(0, expert_P, order_P // 4, gate_P, torch.rand(len(order_P), device="cuda"), *UNSEEN)
    row_N = torch.randint(rows + 1, (5000,), device="cuda")  # the last row is padding
    begun = {0: LayerStatistics.zeros(rows, experts)}
    totals = []
    for used in (None, kernels, kernels):
        sums = RoutedSums(begun, num_layers=1, device=torch.device("cuda:0"), kernels=used)
        for number in range(2):
            sums._layers[0].add(pairs, row_N, np.zeros(rows), number)
        sums.require_finite(0)
        totals.append(sums.totals()[0])
    plain, fused, again = totals
    assert np.array_equal(plain.count_SE, fused.count_SE) and np.array_equal(plain.max_norm_E, fused.max_norm_E)
    for name in SUM_NAMES:
        assert np.allclose(getattr(plain, name), getattr(fused, name), rtol=1e-12)
        assert np.array_equal(getattr(fused, name), getattr(again, name))


@pytest.mark.parametrize("used", [None, kernels], ids=["plain", "fused"])
def test_what_is_not_finite_is_named_with_micro_batch_and_expert(used: Any) -> None:
    expert_P, order_P, gate_P = routed_pairs(500, 16, 4)
    norm_P = torch.rand(len(order_P), device="cuda")
    sums = RoutedSums({0: LayerStatistics.zeros(4, 16)}, num_layers=1, device=torch.device("cuda:0"), kernels=used)
    for number in range(3):
        if number == 1:
            norm_P[(expert_P == 5).nonzero()[3]] = float("nan")
            norm_P[(expert_P == 9).nonzero()[0]] = float("inf")
        pairs = RoutedPairs(0, expert_P, order_P // 4, gate_P, norm_P, *UNSEEN)
        sums._layers[0].add(pairs, torch.zeros(500, dtype=torch.int64, device="cuda"), np.zeros(4), number)
    with pytest.raises(DataError, match="layer 0, expert 5, micro-batch 1"):
        sums.require_finite(0)


def test_m2_nano_keeps_the_same_experts_by_plain_and_by_fused_kernels_but_for_near_ties() -> None:
    plain, fused = (nano_sums(device="cuda", dtype="float32", plain=is_plain) for is_plain in (True, False))
    scores = criteria.score(plain.layers, "reap")
    kept = [plans.select(criteria.score(part.layers, "reap"), keep=36) for part in (plain, fused)]
    for layer, score_E in scores.score_E.items():
        border = np.sort(score_E)[-36]
        for expert in set(kept[0][layer]) ^ set(kept[1][layer]):
            print(json.dumps({"layer": layer, "expert": expert, "distance": abs(score_E[expert] / border - 1)}))
            assert abs(score_E[expert] / border - 1) < 1e-3


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


def test_experts_left_in_fp8_give_the_saliencies_of_bfloat16_within_its_rounding_and_half_of_the_memory() -> None:
    checkpoint = Checkpoint.open(M2_NANO)
    models = [
        StreamedModel(checkpoint, resolve(checkpoint, ARCHITECTURES), device=torch.device("cuda:0"), dtype=torch.bfloat16, fp8=is_fp8)
        for is_fp8 in (False, True)
    ]  # fmt: skip
    assert models[1].layer_nbytes < 0.6 * models[0].layer_nbytes
    rounded, fp8 = (nano_sums(device="cuda", dtype=dtype) for dtype in ("bfloat16", "float8"))
    assert fp8.settings["dtype"] == "float8"
    for index, layer in rounded.layers.items():
        saliency = [layer.gated_norm_SE.sum(0) / layer.count_SE.sum(0).clip(1)]
        other = fp8.layers[index]
        saliency.append(other.gated_norm_SE.sum(0) / other.count_SE.sum(0).clip(1))
        assert np.corrcoef(*saliency)[0, 1] > 0.999
        assert abs(saliency[1].sum() / saliency[0].sum() - 1) < 0.01


def test_a_nan_among_weights_left_in_fp8_is_named(tmp_path: Path) -> None:
    shutil.copytree(M2_NANO, tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    name = next(name for name in checkpoint.tensors if ".layers.2." in name and name.endswith("experts.7.w2.weight"))
    info = checkpoint.tensors[name]
    with (tmp_path / "model" / info.file).open("r+b") as stream:
        stream.seek(info.start + 100)
        stream.write(b"\xff")
    with pytest.raises(DataError, match=re.escape(f"{name!r} in {info.file} holds NaN or infinity: 1 of")):
        observe(tmp_path / "model", [str(M2_NANO / "data/calibration.jsonl")], run=Run(device="cuda", dtype="float8"))


def test_sums_are_the_same_to_the_bit_when_activations_are_kept_on_the_host_and_in_every_run() -> None:
    budget = {"device": "cuda", "dtype": "bfloat16", "activation_budget": 64 << 20}
    first, host, again = (nano_sums(**budget, place=place) for place in ("device", "host", "device"))
    for index, layer in first.layers.items():
        for name in SUM_NAMES:
            assert np.array_equal(getattr(layer, name), getattr(host.layers[index], name))
            assert np.array_equal(getattr(layer, name), getattr(again.layers[index], name))


@pytest.mark.parametrize("place", ["device", "host"])
def test_peak_memory_on_the_device_is_what_the_dry_run_says(place: str) -> None:
    run = Run(device="cuda", dtype="float32", activation_budget=64 << 20, place=place)
    watched = Observation(M2_NANO, [str(M2_NANO / "data/calibration.jsonl")], run=run, max_length=2048, seed=0)
    memory = watched.memory()
    # torch counts its own tensors alone, not what its libraries take nor what lies unused between them.
    expected = sum(memory.values()) - memory["workspaces"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    watched.run()
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
