"""How fast are grouped products of MiniMax-M2's gate and up projections, in bf16 and in FP8 with a scale a row?

    python benchmarks/grouped_products.py [--tokens 32768]

Groups are as uneven as random routing makes them. Also times a plain quantisation of the gathered inputs to FP8, a scale a row.
"""

from __future__ import annotations

import argparse

import torch

from observe_layer import HIDDEN, INNER, NUM_EXPERTS, TOP_K, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32_768)
    pairs = parser.parse_args().tokens * TOP_K
    device = torch.device("cuda", 0)
    inputs = torch.randn(pairs, HIDDEN, device=device).bfloat16()
    weight = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN, device=device).bfloat16()
    counts = torch.bincount(torch.randint(NUM_EXPERTS, (pairs,), device=device), minlength=NUM_EXPERTS)
    offsets = counts.cumsum(0).int()
    narrow, narrow_weight = inputs.to(torch.float8_e4m3fn), (weight / 8).to(torch.float8_e4m3fn)
    scale_P, scale_EI = torch.rand(pairs, device=device), torch.rand(NUM_EXPERTS, 2 * INNER, device=device)
    flops = 2 * pairs * HIDDEN * 2 * INNER

    def fp8(fast: bool) -> torch.Tensor:
        return torch._scaled_grouped_mm(
            narrow, narrow_weight.transpose(-2, -1), scale_P, scale_EI, offs=offsets, out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )  # fmt: skip

    variants = {
        "bf16": lambda _: torch.nn.functional.grouped_mm(inputs, weight.transpose(-2, -1), offs=offsets),
        "FP8, fast accumulation": lambda _: fp8(True),
        "FP8": lambda _: fp8(False),
    }
    for name, product in variants.items():
        time = seconds(product, [inputs], 10)
        print(f"{name:24} {1e3 * time:6.2f} ms  {flops / time / 1e12:5.0f} TFLOP/s")

    def quantise(_: torch.Tensor) -> torch.Tensor:
        return (inputs / (inputs.abs().amax(1, keepdim=True) / 448)).to(torch.float8_e4m3fn)

    print(f"{'quantising the inputs':24} {1e3 * seconds(quantise, [inputs], 10):6.2f} ms")


if __name__ == "__main__":
    main()
