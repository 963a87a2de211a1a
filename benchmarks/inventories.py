"""How long `inspect`, `plan` and `prune --dry-run` take on checkpoints with as many tensors as the largest have.

    python benchmarks/inventories.py [--json FILE]

Writes sparse files with the real names, shapes and dtypes of MiniMax-M2 (96,103 tensors, 230 GB) and of Kimi-K2 (384 experts in 60 layers,
FP8 with block scales), a few megabytes on disk, and runs each command in a process of its own. Fails above 5 s of processor time or 500 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reapkit.tensors import encode_header, nbytes

LIMIT_SECONDS, LIMIT_BYTES = 5.0, 500e6
Tensor = tuple[str, str, tuple[int, ...]]


def fp8(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield name, "F8_E4M3", (rows, columns)
    yield name + "_scale_inv", "F32", (math.ceil(rows / 128), math.ceil(columns / 128))


def minimax_m2(num_layers: int = 62) -> tuple[dict[str, Any], list[Tensor], int]:
    """Config, tensors and number of shards, as docs of the release give them; or a model with fewer of its layers."""
    tensors: list[Tensor] = [
        ("model.embed_tokens.weight", "BF16", (200064, 3072)), ("lm_head.weight", "BF16", (200064, 3072)),
        ("model.norm.weight", "BF16", (3072,)),
    ]  # fmt: skip
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        norms = {
            "input_layernorm": 3072,
            "post_attention_layernorm": 3072,
            "self_attn.q_norm": 6144,
            "self_attn.k_norm": 1024,
        }
        for norm, size in norms.items():
            tensors.append((f"{prefix}{norm}.weight", "BF16", (size,)))
        for part, rows, columns in (("q", 6144, 3072), ("k", 1024, 3072), ("v", 1024, 3072), ("o", 3072, 6144)):
            tensors += fp8(f"{prefix}self_attn.{part}_proj.weight", rows, columns)
        tensors.append((f"{prefix}block_sparse_moe.gate.weight", "F32", (256, 3072)))
        tensors.append((f"{prefix}block_sparse_moe.e_score_correction_bias", "F32", (256,)))
        for expert in range(256):
            for part, rows, columns in (("w1", 1536, 3072), ("w2", 3072, 1536), ("w3", 1536, 3072)):
                tensors += fp8(f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight", rows, columns)
    config = {
        "model_type": "minimax_m2",
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": num_layers,
    }
    return config, tensors, 2 * num_layers + 1


def kimi_k2() -> tuple[dict[str, Any], list[Tensor], int]:
    """The experts, routers and shared experts of Kimi-K2; attention is left out, since it changes nothing here."""
    tensors: list[Tensor] = [("model.norm.weight", "BF16", (7168,))]
    for layer in range(1, 61):
        prefix = f"model.layers.{layer}.mlp."
        tensors.append((f"{prefix}gate.weight", "BF16", (384, 7168)))
        tensors.append((f"{prefix}gate.e_score_correction_bias", "F32", (384,)))
        for owner in ("shared_experts", *(f"experts.{expert}" for expert in range(384))):
            for part, rows, columns in (("gate", 2048, 7168), ("up", 2048, 7168), ("down", 7168, 2048)):
                tensors += fp8(f"{prefix}{owner}.{part}_proj.weight", rows, columns)
    config = {
        "model_type": "kimi_k2", "n_routed_experts": 384, "num_experts_per_tok": 8, "num_hidden_layers": 61, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    return config, tensors, 61


def write_sparse(folder: Path, config: dict[str, Any], tensors: list[Tensor], num_shards: int) -> int:
    """The checkpoint with headers on disk and holes for weights; its apparent size."""
    folder.mkdir()
    fp8_config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fp8_config}))
    size = -(-len(tensors) // num_shards)
    weight_map, total = {}, 0
    for number in range(num_shards):
        part = tensors[number * size : (number + 1) * size]
        file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        header = encode_header(part, metadata={"format": "pt"})
        held = sum(nbytes(dtype, shape) for _, dtype, shape in part)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + held)
        weight_map |= {name: file for name, _, _ in part}
        total += held
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure(*arguments: object) -> dict[str, float]:
    """Wall and processor seconds and peak resident bytes of one command; the processor's do not depend on what else runs."""
    script = (
        "import resource, sys; from reapkit.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    # Whether the disk would hold the output is the last thing that is asked.
    if done.returncode and "its disk has" not in done.stderr:
        raise SystemExit(done.stderr)
    unit = 1 if sys.platform == "darwin" else 1024
    *_, processor, peak = done.stderr.split()
    return {"seconds": round(seconds, 2), "processor_seconds": round(float(processor), 2), "bytes": int(peak) * unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (config, tensors, num_shards) in {"MiniMax-M2": minimax_m2(), "Kimi-K2": kimi_k2()}.items():
            folder, plan = Path(scratch) / name, Path(scratch) / f"{name}.json"
            apparent = write_sparse(folder, config, tensors, num_shards)
            results[name] = {
                "tensors": len(tensors), "apparent_bytes": apparent,
                "inspect": measure("inspect", folder, "--json"),
                "plan": measure("plan", folder, "--criterion", "random", "--ratio", "0.25", "-o", plan, "-q"),
                "prune --dry-run": measure("prune", folder, plan, "-o", Path(scratch) / "out", "--dry-run", "-q"),
            }  # fmt: skip
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    slow = [
        (name, verb, cost)
        for name, costs in results.items()
        for verb, cost in costs.items()
        if isinstance(cost, dict) and (cost["processor_seconds"] > LIMIT_SECONDS or cost["bytes"] > LIMIT_BYTES)
    ]
    if slow:
        raise SystemExit(f"above {LIMIT_SECONDS} s or {LIMIT_BYTES / 1e6:.0f} MB: {slow}")


if __name__ == "__main__":
    main()
