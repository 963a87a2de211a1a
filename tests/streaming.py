"""Independent references for what is streamed: models that transformers loads whole, and text to run them on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import tiny
from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.modules import EXPERTS_NAME, StreamedModel, SuspendedForwards, observed_experts

CPU = torch.device("cpu")

# Products this small only lose time to more threads, most of all where tests run side by side.
torch.set_num_threads(1)


def token_batches(seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Micro-batches of different shapes, one of them a single token."""
    random = np.random.default_rng(seed)
    return [random.integers(3, 99, size=shape) for shape in ((3, 17), (1, 40), (2, 5), (1, 1))]


def streamed_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> StreamedModel:
    checkpoint = Checkpoint.open(folder)
    return StreamedModel(checkpoint, layouts.resolve(checkpoint, ARCHITECTURES), device=CPU, dtype=dtype)


def streamed_logits(
    model: StreamedModel, inputs: Sequence[np.ndarray[Any, Any]], after_batch: Callable[[int, int], None] | None = None
) -> list[torch.Tensor]:
    with SuspendedForwards(model, inputs) as forwards:
        forwards.run_layers(after_batch or (lambda layer, number: None))
        return list(forwards.logits())


def full_model(folder: Path, *, dtype: torch.dtype = torch.float32, experts: str = "eager") -> Any:
    """The model as transformers loads it, all at once, with routers and selection biases as they are stored.

    transformers leaves tensors of FP8 checkpoints in BF16 when asked for float32, and rounds selection biases to BF16.
    """
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, observed_experts)
    options: dict[str, Any] = {"dtype": dtype, "experts_implementation": experts}
    if quantized := tiny.read_json(folder / "config.json").get("quantization_config"):
        # Where there is a GPU, transformers would otherwise keep FP8 weights.
        skipped = quantized["modules_to_not_convert"]
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=skipped)
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if dtype == torch.float32 and not name.endswith("inv_freq"):
            tensor.data = tensor.data.float()
    for name, tensor in tiny.load_tensors(folder).items():
        if tensor.dtype == torch.float32 and name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias")):
            owner, _, leaf = name.replace("block_sparse_moe", "mlp").rpartition(".")
            value = getattr(model.get_submodule(owner), leaf)
            value.data = tensor
    # Weights mapped from a file lie at any address, and products with a single token round by it.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def full_logits(model: Any, inputs: Sequence[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(ids_BT), use_cache=False).logits for ids_BT in inputs]


def with_tensors(
    source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any
) -> Path:
    """A copy of a checkpoint with other tensors and config entries, all in one shard."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model-*.safetensors"))
    tensors = tiny.load_tensors(source)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model-1.safetensors")
    weight_map = dict.fromkeys(tensors, "model-1.safetensors")
    tiny.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    tiny.write_json(folder / "config.json", tiny.read_json(folder / "config.json") | config)
    return tiny.add_tokenizer(folder)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text_rows(count: int, *, seed: int = 0, domains: Sequence[str] = ("a", "b")) -> list[dict[str, Any]]:
    """Rows of random letters, of 1 to 60 tokens, the domains in turn of three."""
    random = np.random.default_rng(seed)
    return [
        {
            "text": "".join(chr(code) for code in random.integers(97, 123, size=random.integers(1, 61))),
            "domain": domains[number // 3 % len(domains)],
        }
        for number in range(count)
    ]
