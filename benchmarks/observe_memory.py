"""Does the peak memory of observing depend on the number of layers? It must not: at most two layers are held at once.

Makes two synthetic MiniMax-M2 checkpoints that differ in the number of layers alone, observes each in a process of its own with the
same text and activation budget, and compares the peaks of resident memory. Exits with 1 if the deeper model's is higher by more than
one layer's bytes.

    python benchmarks/observe_memory.py [--layers 4 16] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, WIDTH, NUM_EXPERTS, TOP_K, HEADS, HEAD_DIM = 512, 512, 32, 4, 8, 64
NUM_DOCUMENTS, DOCUMENT_TOKENS = 16, 512
# Two of four micro-batches: the text is observed in two waves or more.
ACTIVATION_BUDGET = 20 << 20
WORDS = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 16), metavar=("FEW", "MANY"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--child", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        step, folder = arguments.child
        make(Path(folder), arguments.layers[0]) if step == "make" else observe(Path(folder))
        return 0

    runs = []
    for num_layers in arguments.layers:
        with tempfile.TemporaryDirectory(prefix="reapkit-memory-") as folder:
            in_child("make", folder, num_layers)
            runs.append({"layers": num_layers, **in_child("observe", folder, num_layers)})
    few, many = runs
    growth = many["peak_bytes"] - few["peak_bytes"]
    ok = growth <= few["layer_bytes"]
    print(
        f"{'layers':>7}  {'checkpoint':>11}  {'one layer':>10}  {'waves':>5}  {'peak':>9}  {'before':>9}  {'time':>6}"
    )
    for run in runs:
        print(
            f"{run['layers']:>7}  {mb(run['checkpoint_bytes']):>11}  {mb(run['layer_bytes']):>10}  {run['waves']:>5}  "
            f"{mb(run['peak_bytes']):>9}  {mb(run['before_bytes']):>9}  {run['seconds']:>4.0f} s"
        )
    ratio = many["peak_bytes"] / few["peak_bytes"]
    print(f"peak ratio {ratio:.3f}, growth {mb(growth)}: {'at most' if ok else 'MORE THAN'} one layer")
    if arguments.json:
        figures = {"runs": runs, "peak_ratio": ratio, "growth_bytes": growth, "ok": ok}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if ok else 1


def in_child(step: str, folder: str, num_layers: int) -> dict[str, Any]:
    """Run a step in a process of its own, which inherits no peak: this one has imported nothing large."""
    command = [sys.executable, __file__, "--child", step, folder, "--layers", str(num_layers), str(num_layers)]
    reply = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(reply)) if reply.strip() else {}


def mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def make(folder: Path, num_layers: int) -> None:
    """Write a checkpoint in the vendor's layout, BF16, one shard per layer, and the text."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for layer in range(num_layers):
        prefix, tensors = f"model.layers.{layer}.", {}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name in ("q", "k", "v"):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(HEADS * HEAD_DIM, HIDDEN)
        tensors[f"{prefix}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        for name in ("q", "k"):
            tensors[f"{prefix}self_attn.{name}_norm.weight"] = torch.ones(HEADS * HEAD_DIM, dtype=torch.bfloat16)
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = matrix(NUM_EXPERTS, HIDDEN).float()
        tensors[f"{prefix}block_sparse_moe.e_score_correction_bias"] = torch.zeros(NUM_EXPERTS)
        for expert in range(NUM_EXPERTS):
            for name, shape in (("w1", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH)), ("w3", (WIDTH, HIDDEN))):
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(*shape)
        save(f"model-{layer:05d}.safetensors", tensors)
    outer = {"model.embed_tokens.weight": matrix(WORDS, HIDDEN), "lm_head.weight": matrix(WORDS, HIDDEN)}
    save("model-outer.safetensors", {**outer, "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})

    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "dtype": "bfloat16",
        "vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "rotary_dim": HEAD_DIM // 2,
        "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "use_routing_bias": True,
        "scoring_func": "sigmoid", "use_qk_norm": True, "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": 1,
        "max_position_embeddings": DOCUMENT_TOKENS, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    words = random.Random(0)
    documents = [" ".join(str(words.randrange(2, WORDS)) for _ in range(DOCUMENT_TOKENS)) for _ in range(NUM_DOCUMENTS)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def write_tokenizer(folder: Path, words: int = WORDS) -> None:
    """Every number from 2 to that of `words` is a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<eos>": 1, **{str(word): word for word in range(2, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def observe(folder: Path) -> None:
    """Observe and print the figures; the peak is this process's own."""
    from reapkit.observation import Observation, Run

    run = Run(device="cpu", dtype="float32", activation_budget=ACTIVATION_BUDGET)
    observation = Observation(
        folder, [str(folder / "text.jsonl")], run=run, max_length=DOCUMENT_TOKENS, seed=0, revision=None
    )
    before, start = peak_bytes(), time.perf_counter()
    observation.run()
    figures = {
        "checkpoint_bytes": observation.checkpoint.nbytes,
        "layer_bytes": observation.model.layer_nbytes,
        "waves": len(observation.waves),
        "before_bytes": before,
        "peak_bytes": peak_bytes(),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(figures))


def peak_bytes() -> int:
    """Peak resident memory of this process; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
