"""Quantise a pruned bf16 checkpoint afresh with llm-compressor, routers left alone, and load the result again.

    python examples/requantize.py PRUNED OUT [--scheme FP8_DYNAMIC]

PRUNED is what `reapkit prune … --dequantize` wrote: its manifest lists the tensors that decide the routing. Needs
`pip install llmcompressor` in an environment of its own (it asks for an older transformers).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", default="FP8_DYNAMIC", help="a preset of compressed-tensors that needs no data")
    args = parser.parse_args()

    manifest = json.loads((args.pruned / "reapkit.json").read_text())
    # Selection biases are listed too; quantisers know modules only.
    routers = sorted(name.removesuffix(".weight") for name in manifest["routers"] if name.endswith(".weight"))
    tokenizer = AutoTokenizer.from_pretrained(args.pruned)
    model = AutoModelForCausalLM.from_pretrained(args.pruned, dtype=torch.bfloat16)
    ids = torch.tensor([tokenizer("def add(a, b):")["input_ids"]])
    before = logits(model, ids)

    oneshot(
        model=model, recipe=QuantizationModifier(targets="Linear", scheme=args.scheme, ignore=["lm_head", *routers])
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    reloaded, info = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16, output_loading_info=True)
    absent = {kind: sorted(keys) for kind, keys in info.items() if keys}
    if absent:
        raise SystemExit(f"the quantised checkpoint does not load as it should: {absent}")
    ignored = json.loads((args.out / "config.json").read_text())["quantization_config"]["ignore"]
    result = {
        "scheme": args.scheme,
        "routers": len(routers),
        "routers_ignored": sum(name in ignored for name in routers),
        "logits_relative_difference": float((logits(reloaded, ids) - before).norm() / before.norm()),
    }
    print(json.dumps(result, indent=2))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


if __name__ == "__main__":
    main()
