"""What gathering a sample of tokens adds to observing, on one layer's worth of work at MiniMax-M2's size: `observe_reroute.py`.

A checkpoint with few layers of MiniMax-M2's dimensions and random bf16 weights is observed with and without a sample, in the share that
32,768 tokens have of 16 million; the rates of both, and their ratio, are printed as JSON. Needs a GPU; 14 GB of disk for 2 layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
from reapkit.observation import Observation, Run
from reapkit.rerouting import Reroute

SHARE = 32_768 / 16_000_000


def make(folder: Path, *, layers: int, scale: int) -> Path:
    """Random weights in the vendor's names; `scale` divides every dimension but the numbers of experts."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    config = MiniMaxM2Config(
        vocab_size=128, hidden_size=3072 // scale, intermediate_size=1536 // scale, num_hidden_layers=layers,
        num_attention_heads=48 // scale, num_key_value_heads=8 // min(scale, 8), head_dim=128, num_experts_per_tok=8,
        num_local_experts=256, rotary_dim=64, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = MiniMaxM2ForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.cpu().save_pretrained(folder, max_shard_size="4GB")
    return tiny.add_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument(
        "--scale", type=int, default=1, help="divide the dimensions, to try the script where there is no GPU"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = make(Path(place) / "model", layers=options.layers, scale=options.scale)
        text = Path(place) / "text.jsonl"
        rng = np.random.default_rng(0)
        rows = options.tokens // 2048
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
        text.write_text(
            "".join(json.dumps({"text": "".join(rng.choice(letters, 2048))}) + "\n" for _ in range(max(rows, 1)))
        )
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for repeat in range(options.repeats + 1):
            for name, reroute in (("without", None), ("with", Reroute(round(SHARE * options.tokens) or 1))):
                observation = Observation(folder, [str(text)], run=Run(), max_length=2048, seed=0, reroute=reroute)
                start = time.perf_counter()
                observation.run(sample=Path(place) / f"{name}-{repeat}.safetensors")
                if repeat:  # the first of each reads files and compiles kernels
                    seconds[name].append(time.perf_counter() - start)
        result = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "layers": options.layers,
            "tokens": options.tokens,
            "sampled": round(SHARE * options.tokens),
            **{f"seconds_{name}": [round(value, 3) for value in values] for name, values in seconds.items()},
            "added": round(float(np.median(seconds["with"]) / np.median(seconds["without"]) - 1), 4),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
