"""How fast does one full-size MiniMax-M2 layer run while it is observed, and what does observing it cost?

Makes one decoder layer of MiniMax-M2's real shape with random bf16 weights on a GPU, checks each way of running it against float64 on
fresh random inputs, and times them in turn on the same tokens: transformers' own forward through `grouped_mm`, the plain experts function
with its sums, the fused one with its sums, and, last and where it is installed, llm-compressor's REAP modifier. Prints tokens per second,
the share of the floor, and ratios; exits with 1 where the observed forward is slower than transformers' bare one, or where
llm-compressor's mean saliencies are not ours.

llm-compressor's own functions turn the layer's experts into one module each and hook its modifier to them, as its `oneshot` does, with and
without its flag to run every expert on every token, one document at once and all. Only the observed forward is timed: its pipeline also
moves activations to the host, forces eager attention and runs the layer a second time, none of which is done here.

The floor: 0.31 GFLOP a token (8 experts and attention's projections, two a weight) at the measured rate of a grouped product.

    python benchmarks/observe_layer.py [--documents 16] [--length 2048] [--profile] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics as stats
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reapkit.calibration import CalibrationBatch
from reapkit.experts import EXPERTS_NAME, FP8_PROJECTIONS, observed_experts, running, scale_of
from reapkit.formats import dequantize_blocks
from reapkit.fusion import fuse, fused_kernels
from reapkit.statistics import NUM_FOLDS, LayerStatistics
from reapkit.sums import RoutedSums

HIDDEN, INNER, NUM_EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM = 3072, 1536, 256, 8, 48, 8, 128
CONFIG = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rotary_dim": 64, "num_local_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K, "rms_norm_eps": 1e-6, "max_position_embeddings": 196608, "rope_theta": 5_000_000,
    "tie_word_embeddings": False, "use_cache": False,
}  # fmt: skip
# Two operations a weight: eight experts, the four projections of attention, the router.
FLOPS_PER_TOKEN = 2 * (
    3 * TOP_K * HIDDEN * INNER + HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + HIDDEN * NUM_EXPERTS
)
NUM_DOMAINS = 4
# Near-ties in the router move some pairs in a thousand to another expert, and with them its mean.
MAX_DIFFERENCE = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print where the time of the fused path goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs a GPU")
        return 2
    device = torch.device("cuda", 0)
    model, rotary, experts_config = make_layer(device)
    layer = model.model.layers[0]
    batch = make_batch(arguments.documents, arguments.length)
    hidden = [torch.randn(arguments.documents, arguments.length, HIDDEN, device=device).bfloat16() for _ in range(2)]
    positions = torch.arange(arguments.length, device=device)[None]
    embeddings = rotary(hidden[0], positions)

    def forward(inputs: Tensor) -> Tensor:
        result = layer(inputs, position_embeddings=embeddings, attention_mask=None, position_ids=positions)
        return result[0] if isinstance(result, tuple) else result

    tokens = arguments.documents * arguments.length
    rate_of_product = grouped_rate(device, tokens)
    floor = rate_of_product / FLOPS_PER_TOKEN
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device), "torch": torch.__version__, "tokens": tokens,
        "grouped_product_flops": rate_of_product, "flops_per_token": FLOPS_PER_TOKEN, "floor_tokens_per_second": floor,
    }  # fmt: skip
    figures["errors"] = errors(layer, rotary, experts_config, device)
    print(f"{figures['device']}, torch {torch.__version__}; {tokens:,} tokens; grouped product {rate_of_product / 1e12:.0f} TFLOP/s,"
          f" so the floor is {floor / 1e6:.2f}M tokens/s")  # fmt: skip
    print(f"relative errors against float64: {figures['errors']}")
    variants = {
        "transformers, grouped_mm, not observed": ("grouped_mm", False, False, False),
        "plain, observed": (EXPERTS_NAME, False, True, False),
        "fused, not observed": (EXPERTS_NAME, True, False, False),
        "fused, observed": (EXPERTS_NAME, True, True, False),
        "fused, experts in FP8, not observed": (EXPERTS_NAME, True, False, True),
        "fused, experts in FP8, observed": (EXPERTS_NAME, True, True, True),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(2):  # all in turn, twice: the difference of the two rounds is the spread
        for name, (implementation, is_fused, is_observed, is_fp8) in variants.items():
            with running_as(layer, experts_config, device, batch, implementation, is_fused, is_observed, is_fp8=is_fp8):
                rates[name].append(tokens / seconds(forward, hidden, arguments.repeats))
    print(f"{'':42} {'tokens/s':>10} {'of the floor':>13} {'spread':>8}")
    show(rates, floor)
    figures["tokens_per_second"] = rates
    if arguments.profile:
        for is_fp8 in (False, True):
            print("experts in FP8" if is_fp8 else "experts in bf16")
            with running_as(layer, experts_config, device, batch, EXPERTS_NAME, True, True, is_fp8=is_fp8):
                profile(forward, hidden[0])
    is_same = True
    if importlib.util.find_spec("llmcompressor"):
        with running_as(layer, experts_config, device, batch, EXPERTS_NAME, True, True) as routed:
            forward(hidden[0])
            routed.require_finite(0)
        theirs, differences = llm_compressor(model, forward, hidden[0], routed.totals()[0])
        show(theirs, floor)
        ratio = sum(rates["fused, observed"]) / sum(next(iter(theirs.values())))
        print(f"fused, observed, is {ratio:.1f} times as fast as {next(iter(theirs))}, the default of oneshot")
        print(f"mean saliencies, llm-compressor against fused: {differences}")
        rates |= theirs
        figures["llm_compressor"] = {
            "version": version("llmcompressor"), "default": next(iter(theirs)), "saliency_against_fused": differences,
        }  # fmt: skip
        is_same = all(found["greatest relative difference"] < MAX_DIFFERENCE for found in differences.values())
    else:
        print("llm-compressor is not installed, so it was not timed")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    is_fast = sum(rates["fused, observed"]) >= sum(rates["transformers, grouped_mm, not observed"])
    return 0 if is_fast and is_same else 1


def show(rates: dict[str, list[float]], floor: float) -> None:
    for name, (first, second) in rates.items():
        mean = (first + second) / 2
        print(f"{name:42} {mean / 1e6:>9.3f}M {mean / floor:>12.1%} {abs(first - second) / mean:>8.1%}")


def make_layer(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any, Any]:
    """A model on the meta device but for its one decoder layer, which has random weights of a plausible size; its rotary embedding; and
    the config that names its experts function."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, observed_experts)
    config = AutoConfig.for_model("minimax_m2", **CONFIG)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="grouped_mm")
    model = model.eval().requires_grad_(False)
    layer = model.model.layers[0].to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in layer.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    layer.mlp.e_score_correction_bias.normal_(0.0, 0.01, generator=generator)
    # On disk router and bias are F32, and they are computed with so.
    layer.mlp.gate.weight = torch.nn.Parameter(layer.mlp.gate.weight.float(), requires_grad=False)
    layer.mlp.e_score_correction_bias = layer.mlp.e_score_correction_bias.float()
    round_to_fp8(layer.mlp.experts)
    rotary = type(model.model.rotary_emb)(config).to(device)
    return model, rotary, layer.mlp.experts.config if hasattr(layer.mlp.experts, "config") else config


def round_to_fp8(experts: Any) -> None:
    """Give experts values that a checkpoint in FP8 has, and keep them both ways: in bf16, and in FP8 with scales."""
    experts.stored = {}
    for name in FP8_PROJECTIONS:
        weight_E = getattr(experts, name)
        fp8_E = torch.empty_like(weight_E, dtype=torch.float8_e4m3fn)
        scale_E = weight_E.new_empty(
            *(size // part for size, part in zip(weight_E.shape, (1, 128, 128), strict=True)), dtype=torch.float32
        )
        for weight, fp8, scale in zip(weight_E, fp8_E, scale_E, strict=True):
            blocks = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            scale.copy_(blocks.abs().amax((1, 3)) / 448)
            fp8.copy_((blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1))
            weight.copy_(dequantize_blocks(fp8, scale, block=(128, 128), dtype=weight.dtype))
        experts.stored |= {name: fp8_E, scale_of(name): scale_E}


def make_batch(documents: int, length: int) -> CalibrationBatch:
    number_B = np.arange(documents)
    return CalibrationBatch(
        input_ids_BT=np.zeros((documents, length), dtype=np.int64),
        length_B=np.full(documents, length),
        domain_B=number_B % NUM_DOMAINS,
        index_B=number_B,
    )


@contextmanager
def running_as(
    layer: Any,
    config: Any,
    device: torch.device,
    batch: CalibrationBatch,
    implementation: str,
    is_fused: bool,
    is_observed: bool,
    *,
    is_fp8: bool = False,
) -> Iterator[RoutedSums]:
    """Run the layer through an experts function, fused or not, observed or not, and with experts in FP8 or not."""
    kernels = fused_kernels(device) if is_fused else None
    begun = {0: LayerStatistics.zeros(NUM_DOMAINS * NUM_FOLDS, NUM_EXPERTS)}
    sums = RoutedSums(begun, num_layers=1, device=device, kernels=kernels)
    before = config._experts_implementation
    config._experts_implementation = implementation
    running.layer, running.kernels = 0, kernels
    running.observe = sums.observer(batch, 0) if is_observed else None
    if kernels is not None:
        fuse(layer, kernels)
    experts = layer.mlp.experts
    in_bf16 = {name: getattr(experts, name) for name in FP8_PROJECTIONS}
    if is_fp8:
        for name, value in experts.stored.items():
            setattr(experts, name, torch.nn.Parameter(value, requires_grad=False))
    try:
        with torch.inference_mode():
            yield sums
    finally:
        config._experts_implementation = before
        running.observe = running.kernels = None
        if is_fp8:
            for name, value in in_bf16.items():
                setattr(experts, name, value)
                delattr(experts, scale_of(name))
        for module in layer.modules():
            module.__dict__.pop("forward", None)


def llm_compressor(
    model: Any, forward: Callable[[Tensor], Tensor], hidden: Tensor, ours: LayerStatistics
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Tokens per second of llm-compressor's observed forward, its default first, and how far its mean saliencies are from `ours`.

    The layer's experts stay as llm-compressor leaves them, so nothing else can be timed on it afterwards.

    Args:
        hidden: [documents, length, hidden size].
        ours: what we observed on the same tokens.
    """
    from llmcompressor.args import DatasetArguments
    from llmcompressor.core import Event, EventType, State
    from llmcompressor.modeling.moe.context import moe_calibration_context
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

    with hidden.device:
        linearize_moe(model)
    default = DatasetArguments.moe_calibrate_all_experts
    count_E = ours.count_SE.sum(0)
    saliency_E = ours.gated_norm_SE.sum(0) / count_E.clip(1)
    rates: dict[str, list[float]] = {}
    differences = {}
    for _ in range(2):
        for at_once in dict.fromkeys((DatasetArguments.batch_size, len(hidden))):
            for is_for_all in (default, not default):
                name = f"llm-compressor, {'all' if is_for_all else 'routed'} experts, {at_once} at once"
                state, modifier = State(model=model), REAPPruningModifier(sparsity=0.5)
                modifier.initialize(state)

                def observed(inputs: Tensor, at_once: int = at_once) -> Tensor:
                    return torch.cat([forward(part) for part in inputs.split(at_once)])

                with torch.no_grad(), moe_calibration_context() if is_for_all else nullcontext():
                    modifier.update_event(state, Event(type_=EventType.CALIBRATION_START))
                    (tracker,) = modifier._saliency_trackers.values()
                    observed(hidden)
                    theirs_E = tracker.mean_saliency.numpy()
                    moved = np.abs(tracker.count.cpu().numpy() - count_E).sum() / 2
                    rate = hidden.shape[:2].numel() / seconds(observed, [hidden], 3)
                    modifier.update_event(state, Event(type_=EventType.CALIBRATION_END))
                rates.setdefault(name, []).append(rate)
                differences[name] = {
                    "greatest relative difference": float(np.abs(theirs_E / saliency_E - 1).max()),
                    "median relative difference": float(np.median(np.abs(theirs_E / saliency_E - 1))),
                    "pairs that went to another expert": float(moved / count_E.sum()),
                }
    return rates, differences


def seconds(forward: Callable[[Tensor], Tensor], inputs: list[Tensor], repeats: int) -> float:
    """Median time of a forward, by the device's clock, over inputs in turn."""
    for tensor in inputs:
        forward(tensor)
    times = []
    for number in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        forward(inputs[number % len(inputs)])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return stats.median(times)


def grouped_rate(device: torch.device, tokens: int) -> float:
    """Operations per second of `grouped_mm` on the gate and up projections, groups as uneven as random routing makes them."""
    pairs = tokens * TOP_K
    inputs = torch.randn(pairs, HIDDEN, device=device).bfloat16()
    weight = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN, device=device).bfloat16()
    counts = torch.bincount(torch.randint(NUM_EXPERTS, (pairs,), device=device), minlength=NUM_EXPERTS)
    offsets = counts.cumsum(0).int()
    product = torch.nn.functional.grouped_mm
    time = seconds(lambda _: product(inputs, weight.transpose(-2, -1), offs=offsets), [inputs], 10)
    return 2 * pairs * HIDDEN * 2 * INNER / time


def errors(layer: Any, rotary: Any, config: Any, device: torch.device) -> dict[str, float]:
    """Relative error of each path's output on fresh inputs, against the same layer in float64; and of the sums, against plain float64."""
    hidden = torch.randn(2, 256, HIDDEN, device=device).bfloat16()
    positions = torch.arange(256, device=device)[None]
    batch = make_batch(2, 256)
    outputs, sums = {}, {}
    for name, implementation, is_fused in (
        ("transformers", "grouped_mm", False), ("plain", EXPERTS_NAME, False), ("fused", EXPERTS_NAME, True), ("FP8", EXPERTS_NAME, True)
    ):  # fmt: skip
        with running_as(layer, config, device, batch, implementation, is_fused, True, is_fp8=name == "FP8") as routed:
            out = layer(
                hidden, position_embeddings=rotary(hidden, positions), attention_mask=None, position_ids=positions
            )
            outputs[name] = (out[0] if isinstance(out, tuple) else out) - hidden
            routed.require_finite(0)
            sums[name] = routed.totals()[0]
    with running_as(layer, config, device, batch, "eager", False, False):
        wide = reference(layer, rotary, config, hidden, positions)

    def error(out: Tensor) -> float:
        # The median over tokens: of a few, a near-tie in the router falls the other way, which is no error of the path.
        return float(((out.double() - wide).norm(dim=-1) / wide.norm(dim=-1)).median())

    result = {name: error(out) for name, out in outputs.items()}
    total = sums["plain"].gated_norm_SE.sum(0)
    # Near-ties move pairs from one expert to another: half of the share that moved, and the change of the whole.
    moved = np.abs(sums["fused"].count_SE.sum(0) - sums["plain"].count_SE.sum(0)).sum() / 2
    result["pairs that went to another expert"] = float(moved / sums["plain"].count_SE.sum())
    for name in ("fused", "FP8"):
        result[f"sums, {name} against plain"] = float(abs(sums[name].gated_norm_SE.sum() / total.sum() - 1))
    return result


def reference(layer: Any, rotary: Any, config: Any, hidden: Tensor, positions: Tensor) -> Tensor:
    """What the layer adds to its input, in float64 but for the choice of experts, one expert at a time to save memory."""
    from transformers.activations import ACT2FN

    def wide(module: Any, tensor: Tensor) -> Tensor:
        return tensor @ module.weight.double().T

    def normed(module: Any, tensor: Tensor) -> Tensor:
        return (
            tensor * (tensor.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight.double()
        )

    x = hidden.double()
    attention, h = layer.self_attn, normed(layer.input_layernorm, hidden.double())
    cos, sin = (part.double()[:, None] for part in rotary(hidden, positions))

    def heads(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def rotated(tensor: Tensor) -> Tensor:
        width = cos.shape[-1]
        turned, rest = tensor[..., :width], tensor[..., width:]
        first, second = turned.chunk(2, -1)
        return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)

    q = rotated(heads(normed(attention.q_norm, wide(attention.q_proj, h))))
    k = rotated(heads(normed(attention.k_norm, wide(attention.k_proj, h))))
    v = heads(wide(attention.v_proj, h))
    groups = HEADS // KV_HEADS
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), is_causal=True
    )
    x = x + wide(attention.o_proj, mixed.transpose(1, 2).flatten(2))
    h = normed(layer.post_attention_layernorm, x).flatten(0, 1)
    score = (h @ layer.mlp.gate.weight.double().T).sigmoid()
    chosen = (score + layer.mlp.e_score_correction_bias.double()).topk(TOP_K).indices
    gate = score.gather(1, chosen)
    gate = gate / gate.sum(-1, keepdim=True)
    y, act = torch.zeros_like(h), ACT2FN["silu"]
    for expert in range(NUM_EXPERTS):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        up = h[token] @ layer.mlp.experts.gate_up_proj[expert].double().T
        first, second = up.chunk(2, -1)
        out = (act(first) * second) @ layer.mlp.experts.down_proj[expert].double().T
        y[token] += out * gate[token, place, None]
    return x + y.view(x.shape) - hidden.double()


def profile(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            forward(hidden)
        torch.cuda.synchronize()
    rows = [row for row in profiler.key_averages() if row.self_device_time_total > 0 and row.device_type.name == "CUDA"]
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:28]:
        print(f"{row.self_device_time_total / 3e3:8.3f} ms  {row.count // 3:>3}x  {row.key[:110]}")


if __name__ == "__main__":
    sys.exit(main())
