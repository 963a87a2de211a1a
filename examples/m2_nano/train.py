"""Trains m2-nano on one GPU in some minutes and exports it in MiniMax-M2's layout.

    python examples/m2_nano/train.py models/m2-nano --gsm8k FILE --minutes 7

Float32 master weights, bfloat16 arithmetic. Routers are balanced as in the vendor's design, by nudging the selection bias, without
an auxiliary loss. In the last part of the run the FP8 rounding of the export is applied in the forward pass, so that the weights settle on
values that survive it. Processes write new text all the time; a batch is only used again when they are too slow.

Shapes: B rows, T tokens of a row, N = B x T, K experts of a token, E experts, H hidden, I width of an expert.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import queue as queues
import random
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from card import write_card
from corpus import gsm8k_rows, is_held_out_module, is_held_out_problem, stdlib_modules
from export import ATTENTION, CONFIG, dequantize, quantize, write_checkpoint
from score import experts_implementation, load, measure_loss, read_rows, score_model
from tasks import draw
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, MiniMaxM2Config, MiniMaxM2ForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROW_TOKENS = 640
SHARES = {"python": 0.20, "arithmetic": 0.23, "tools": 0.17, "lookup": 0.26, "stdlib": 0.10, "gsm8k": 0.04}
# Replies are what the model is for; prompts get a little weight so that their text is no stranger to it.
REPLY_WEIGHT, PROMPT_WEIGHT = 10, 1
BIAS_STEP = 0.002
KEPT_BATCHES = 600


def grouped_experts(
    self: torch.nn.Module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weight_NK: torch.Tensor
) -> torch.Tensor:
    """transformers' experts, with bfloat16 copies of the float32 weights on a GPU, a cheap backward, and the load of each expert kept."""
    num_tokens, top_k = index_NK.shape
    flat = index_NK.reshape(-1)
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    self.load_E = torch.zeros(self.num_experts, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.float32)
    )
    offsets_E = self.load_E.cumsum(0).to(torch.int32)
    dtype = torch.bfloat16 if hidden_NH.is_cuda else torch.float32
    each = hidden_NH.to(dtype).unsqueeze(1).expand(-1, top_k, -1).reshape(num_tokens * top_k, -1)
    sorted_hidden = Shuffle.apply(each, order, inverse)
    gate, up = grouped_mm(sorted_hidden, self.gate_up_proj.to(dtype).transpose(-2, -1), offs=offsets_E).chunk(2, dim=-1)
    down = grouped_mm(functional.silu(gate) * up, self.down_proj.to(dtype).transpose(-2, -1), offs=offsets_E)
    back_NKH = Shuffle.apply(down, inverse, order).view(num_tokens, top_k, -1)
    return (back_NKH * weight_NK.to(back_NKH.dtype).unsqueeze(-1)).sum(1).to(hidden_NH.dtype)


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    if rows.is_cuda:
        return (getattr(functional, "grouped_mm", None) or torch._grouped_mm)(rows, weights, offs=offs)
    ends = offs.tolist()
    return torch.cat([rows[a:b] @ weight for a, b, weight in zip([0, *ends], ends, weights, strict=False)])


class Shuffle(torch.autograd.Function):
    """`rows[order]` whose backward is a gather too; autograd's own would sort and add up."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient[ctx.saved_tensors[0]], None, None


class Rounding(torch.nn.Module):
    """FP8 rounding in the forward pass, nothing in the backward pass; off until asked for."""

    enabled = False

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return weight
        with torch.no_grad():
            change = dequantize(*quantize(weight)) - weight
        return weight + change


class Packer:
    """Fills rows with whole documents; a row's rest is filled with the head of one more, so no position is padding."""

    def __init__(
        self, rng: random.Random, tokenizer: PreTrainedTokenizerBase, texts: list[np.ndarray], problems: list[dict]
    ):
        self.rng, self.tokenizer, self.texts, self.problems = rng, tokenizer, texts, problems
        self.drawn = dict.fromkeys(SHARES, 0)
        self.role = tokenizer.convert_tokens_to_ids("]~b]")
        self.reply = tokenizer("ai\n", add_special_tokens=False).input_ids
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def document(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss weights of one document from the domain that is furthest behind its share."""
        domain = min(SHARES, key=lambda name: self.drawn[name] / SHARES[name])
        if domain == "stdlib":
            text = self.rng.choice(self.texts)
            start = self.rng.randrange(max(len(text) - ROW_TOKENS // 2, 1))
            ids = text[start : start + ROW_TOKENS]
            weights = np.full(len(ids), REPLY_WEIGHT, np.uint8)
        else:
            row = self.rng.choice(self.problems) if domain == "gsm8k" else draw(domain, self.rng)
            ids, weights = self.chat(row)
        self.drawn[domain] += len(ids)
        return ids, weights

    def chat(self, row: dict) -> tuple[np.ndarray, np.ndarray]:
        text = self.tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        weights, replying = np.full(len(ids), PROMPT_WEIGHT, np.uint8), False
        for i, token in enumerate(ids):
            if replying:
                weights[i] = REPLY_WEIGHT
                replying = token != self.tokenizer.eos_token_id
            elif token == self.role:
                replying = ids[i + 1 : i + 1 + len(self.reply)] == self.reply
        return np.array(ids, np.uint16), weights

    def row(self) -> np.ndarray:
        """ids, positions and weights [3, T]; a position of 0 starts a document."""
        row, filled = np.zeros((3, ROW_TOKENS), np.uint16), 0
        while filled < ROW_TOKENS:
            room = ROW_TOKENS - filled
            fitting = next((i for i, (ids, _) in enumerate(self.waiting) if len(ids) <= room), None)
            if fitting is not None:
                ids, weights = self.waiting.pop(fitting)
            else:
                ids, weights = self.document()
                if len(ids) > room and len(ids) <= ROW_TOKENS and len(self.waiting) < 16:
                    self.waiting.append((ids, weights))
                    continue
            count = min(len(ids), room)
            row[:, filled : filled + count] = ids[:count], np.arange(count), weights[:count]
            filled += count
        return row


def produce(
    seed: int, tokenizer: PreTrainedTokenizerBase, texts: list[np.ndarray], problems: list[dict], rows: int, out: Any
) -> None:
    """Endless batches [B, 3, T] into a queue; runs in a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    packer = Packer(random.Random(seed), tokenizer, texts, problems)
    while True:
        out.put(np.stack([packer.row() for _ in range(rows)]))


class Supply:
    """New batches while there are any, else old ones at random."""

    def __init__(self, incoming: Any, seed: int):
        self.incoming, self.rng, self.kept, self.fresh, self.used = (
            incoming,
            random.Random(seed),
            deque(maxlen=KEPT_BATCHES),
            0,
            0,
        )

    def next(self) -> np.ndarray:
        self.used += 1
        try:
            batch = self.incoming.get(timeout=None if not self.kept else 0.001)
        except queues.Empty:
            return self.rng.choice(self.kept)
        self.fresh += 1
        self.kept.append(batch)
        return batch


def float_model(trained: MiniMaxM2ForCausalLM, device: str) -> MiniMaxM2ForCausalLM:
    """The trained weights before export, in a model without anything of the training in it."""
    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**model_settings()))
    model.load_state_dict(plain_weights(trained))
    model.set_experts_implementation(experts_implementation(device))
    return model.to(device).eval()


def copy_sidecars(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
            shutil.copy(source / name, target / name)


def model_settings() -> dict[str, Any]:
    """What the model is built from, without `use_mtp`: transformers' generate would look for the absent MTP weights."""
    return {
        key: value
        for key, value in CONFIG.items()
        if key not in ("quantization_config", "architectures", "dtype", "use_mtp")
    }


def build_model(device: str, seed: int, start: Path | None) -> MiniMaxM2ForCausalLM:
    torch.manual_seed(seed)
    ALL_EXPERTS_FUNCTIONS.register("m2_nano_training", grouped_experts)
    # The first weights are drawn wider than the vendor's 0.02, which is meant for a hidden size of 3,072.
    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**model_settings() | {"initializer_range": 0.04}))
    if start is not None:
        model.load_state_dict(load(start, "cpu")[0].state_dict())
    model.set_experts_implementation("m2_nano_training")
    for layer in model.model.layers:
        layer.mlp.gate.forward = torch.autocast(device, enabled=False)(layer.mlp.gate.forward)
        for module, name in [(getattr(layer.self_attn, name), "weight") for name in ATTENTION] + [
            (layer.mlp.experts, "gate_up_proj"), (layer.mlp.experts, "down_proj"),
        ]:  # fmt: skip
            parametrize.register_parametrization(module, name, Rounding())
    return model.to(device)


def plain_weights(model: MiniMaxM2ForCausalLM) -> dict[str, torch.Tensor]:
    """The float32 weights in transformers' names."""
    return {
        name.replace(".parametrizations", "").removesuffix(".original"): tensor.detach()
        for name, tensor in model.state_dict().items()
    }


def batch_loss(model: MiniMaxM2ForCausalLM, batch: np.ndarray, device: str) -> torch.Tensor:
    """Weighted cross entropy; documents of a row do not see each other and each starts at position 0."""
    ids_BT, positions_BT, weights_BT = (
        torch.from_numpy(batch.astype(np.int32)).to(device, non_blocking=True).long().unbind(1)
    )
    document_BT = (positions_BT == 0).cumsum(1)
    causal_TT = torch.ones(ids_BT.shape[1], ids_BT.shape[1], dtype=torch.bool, device=device).tril()
    mask_B1TT = ((document_BT[:, :, None] == document_BT[:, None, :]) & causal_TT)[:, None]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        hidden = model.model(
            ids_BT, attention_mask=mask_B1TT, position_ids=positions_BT, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
    weights = weights_BT[:, 1:] * (positions_BT[:, 1:] > 0)
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def balance(model: MiniMaxM2ForCausalLM, step: float) -> torch.Tensor:
    """Nudges every selection bias toward equal loads; returns the largest load over the mean."""
    worst = torch.zeros(())
    for layer in model.model.layers:
        load_E, bias_E = layer.mlp.experts.load_E, layer.mlp.e_score_correction_bias
        bias_E += step * (load_E.mean() - load_E).sign()
        bias_E -= bias_E.mean()
        worst = torch.maximum(worst.to(load_E.device), load_E.max() / load_E.mean())
    return worst


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 3 % of the time, then a cosine down to nothing."""
    return peak * min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def train(model: MiniMaxM2ForCausalLM, supply: Supply, options: argparse.Namespace) -> dict[str, Any]:
    """Trains for the given time and returns the log."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=options.device == "cuda")
    roundings = [module for module in model.modules() if isinstance(module, Rounding)]
    model.train()
    supply.next()
    budget, begin, log, step, tokens, logged = options.minutes * 60, time.monotonic(), [], 0, 0, 0.0
    while (elapsed := time.monotonic() - begin) < budget and step < options.max_steps:
        progress = elapsed / budget
        for module in roundings:
            module.enabled = progress >= options.fp8_from
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.learning_rate)
        batch = supply.next()
        loss = batch_loss(model, batch, options.device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            worst = balance(model, BIAS_STEP * max(1.0 - progress, 0.05))
        step, tokens = step + 1, tokens + batch.shape[0] * batch.shape[2]
        if elapsed - logged > options.log_seconds or step == 1:
            logged = elapsed
            entry = {
                "seconds": round(elapsed, 1), "step": step, "tokens": tokens, "loss": round(loss.item(), 4),
                "gradient_norm": round(norm.item(), 3), "largest_load": round(worst.item(), 2), "fresh_batches": supply.fresh,
            }  # fmt: skip
            log.append(entry)
            print(json.dumps(entry), flush=True)
    for module in roundings:
        module.enabled = False
    seconds = time.monotonic() - begin
    return {
        "minutes": round(seconds / 60, 2), "steps": step, "tokens": tokens, "tokens_per_second": round(tokens / seconds),
        "fresh_share": round(supply.fresh / supply.used, 3), "final_loss": round(loss.item(), 4), "log": log,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where tokenizer and data lie")
    parser.add_argument("--out", type=Path, help="where to write the checkpoint; the same folder if left out")
    parser.add_argument("--gsm8k", type=Path, help="jsonl.gz with question and answer; else the hub's")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--batch-rows", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--fp8-from", type=float, default=0.7, help="part of the time after which FP8 rounding starts")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    parser.add_argument("--log-seconds", type=float, default=10.0)
    parser.add_argument("--limit", type=int, help="rows of each domain to score")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    out = options.out or options.folder
    out.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    sources = [source for name, source in stdlib_modules().items() if not is_held_out_module(name)]
    encoded = tokenizer.backend_tokenizer.encode_batch(sources, add_special_tokens=False)
    texts = [np.array(text.ids, np.uint16) for text in encoded if len(text.ids) > 64]
    problems = [row for row in gsm8k_rows(options.gsm8k) if not is_held_out_problem(row)]
    context = multiprocessing.get_context("fork")
    incoming = context.Queue(maxsize=4 * options.workers)
    for worker in range(options.workers):
        arguments = (options.seed * 1000 + worker, tokenizer, texts, problems, options.batch_rows, incoming)
        context.Process(target=produce, args=arguments, daemon=True).start()
    real = {
        "stdlib_tokens": sum(map(len, texts)),
        "gsm8k_rows": len(problems),
        "prepared_seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(real), flush=True)

    model = build_model(options.device, options.seed, options.start)
    run = train(model, Supply(incoming, options.seed), options)
    write_checkpoint(plain_weights(model), out)
    print(json.dumps({key: value for key, value in run.items() if key != "log"}), flush=True)

    rows = read_rows(options.folder / "data" / "heldout.jsonl")
    before = float_model(model, options.device)
    copy_sidecars(options.folder, out)
    after, _ = load(out, options.device)
    scores, losses = {}, {}
    for name, candidate in (("float32", before), ("fp8", after)):
        scores[name] = score_model(candidate, tokenizer, rows, limit=options.limit, batch_size=64)
        losses[name] = measure_loss(candidate, tokenizer, rows)
        print(name, json.dumps(scores[name]), json.dumps(losses[name]), flush=True)
    settings = {
        "row_tokens": ROW_TOKENS, "batch_tokens": ROW_TOKENS * options.batch_rows, "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay, "fp8_from": options.fp8_from, "seed": options.seed, "shares": SHARES,
        "reply_weight": REPLY_WEIGHT, "prompt_weight": PROMPT_WEIGHT, "bias_step": BIAS_STEP,
    }  # fmt: skip
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    earlier = json.loads((options.start / "training.json").read_text())["runs"] if options.start else []
    runs = [*earlier, {"device": device, "versions": versions, "settings": settings, "data": real, **run}]
    training = {
        "parameters": sum(p.numel() for p in before.parameters()),
        "scores": scores,
        "losses": losses,
        "runs": runs,
    }
    (out / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    write_card(out)


if __name__ == "__main__":
    main()
