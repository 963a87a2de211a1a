"""Scores a model on the generated domains: greedy replies, compared exactly, code by running it.

    python examples/m2_nano/score.py models/m2-nano --data models/m2-nano/data/heldout.jsonl --json

Works on any checkpoint that transformers loads and that has m2-nano's chat template, pruned ones included.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sandbox
import torch
from tasks import DOMAINS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SPARE_TOKENS = 24  # how much longer than the longest reference of its batch a reply may get


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def experts_implementation(device: str) -> str:
    """The fastest that takes float32: torch's grouped product, which on a GPU takes bfloat16 only."""
    return "grouped_mm" if device == "cpu" else "eager"


def load(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32, FP8 weights dequantised, and its tokenizer."""
    config = json.loads((Path(folder) / "config.json").read_text())
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": experts_implementation(device)}
    if "quantization_config" in config:
        skipped = config["quantization_config"]["modules_to_not_convert"]
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=skipped)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    # A quantised checkpoint's BF16 tensors stay BF16 whatever dtype is asked for, hence the second cast.
    return model.float().to(device).eval(), AutoTokenizer.from_pretrained(folder)


def prompt_text(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything before the last assistant turn, with the generation prompt."""
    return tokenizer.apply_chat_template(
        row["messages"][:-1], tools=row.get("tools"), tokenize=False, add_generation_prompt=True
    )


def reference_reply(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a perfect model would generate after the prompt."""
    full = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return full.removeprefix(prompt_text(row, tokenizer)).rstrip("\n")


def parse_calls(text: str, tools: list[dict]) -> list[dict] | None:
    """The tool calls in a reply with arguments typed by the schema, or None where the block cannot be read."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools}
    block = re.fullmatch(r"<minimax:tool_call>\n(.*)\n</minimax:tool_call>", text, re.DOTALL)
    if not block:
        return None
    calls = []
    for name, body in re.findall(r'<invoke name="([^"]*)">\n(.*?)</invoke>', block[1], re.DOTALL):
        arguments: dict[str, Any] = {}
        for key, value in re.findall(r'<parameter name="([^"]*)">(.*?)</parameter>', body, re.DOTALL):
            is_integer = schemas.get(name, {}).get(key, {}).get("type") == "integer" and re.fullmatch(
                r"-?\d{1,9}", value
            )
            arguments[key] = int(value) if is_integer else value
        calls.append({"name": name, "arguments": arguments})
    return calls


def is_right(row: dict, reply: str) -> bool:
    """Whether a reply, as generated after the prompt, solves its row."""
    content = reply.split("</think>")[-1].replace("[e~[", "").strip()
    if "calls" in row:
        return parse_calls(content, row["tools"]) == row["calls"]
    if "tests" in row:
        block = re.fullmatch(r"```python\n(.*)```", content, re.DOTALL)
        return block is not None and sandbox.passes(block[1], row["entry_point"], row["tests"])
    return content == row["answer"]


@torch.inference_mode()
def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], batch_size: int) -> list[str]:
    """Greedy replies in the order of the rows, special tokens kept."""
    prompts = [tokenizer(prompt_text(row, tokenizer), add_special_tokens=False).input_ids for row in rows]
    lengths = [len(tokenizer(reference_reply(row, tokenizer), add_special_tokens=False).input_ids) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    found = [""] * len(rows)
    for start in range(0, len(rows), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        pad, device = tokenizer.pad_token_id, model.device
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            max_new_tokens=max(lengths[i] for i in batch) + SPARE_TOKENS,
        )
        for i, tokens in zip(batch, output[:, width:].tolist(), strict=True):
            ended = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            found[i] = tokenizer.decode(tokens[:ended], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return found


def score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict],
    *,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """`score` for a model in memory."""
    results = {}
    rows = list(rows)
    for domain in DOMAINS:
        chosen = [row for row in rows if row["domain"] == domain][:limit]
        if chosen:
            generated = replies(model, tokenizer, chosen, batch_size)
            value = sum(map(is_right, chosen, generated)) / len(chosen)
            error = math.sqrt(value * (1 - value) / len(chosen))
            results[domain] = {"value": value, "standard_error": error, "count": len(chosen)}
    return results


def score(
    model_dir: Path | str, rows: Iterable[dict], *, limit: int | None = None, batch_size: int = 64, device: str = "cpu"
) -> dict:
    """Fraction of rows solved in every generated domain: `{domain: {"value", "standard_error", "count"}}`.

    `limit` takes the first so many rows of each domain; domains without a right answer (real text) are left out.
    """
    model, tokenizer = load(Path(model_dir), device)
    return score_model(model, tokenizer, rows, limit=limit, batch_size=batch_size)


@torch.inference_mode()
def measure_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict]
) -> dict[str, dict[str, float]]:
    """Nats per token of the whole text of each row, by domain; the standard error is over rows."""
    losses: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=model.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        losses.setdefault(row["domain"], []).append((loss, ids.shape[1] - 1))
    results = {}
    for domain, pairs in losses.items():
        tokens = sum(count for _, count in pairs)
        mean = sum(loss for loss, _ in pairs) / tokens
        spread = math.sqrt(sum((loss - mean * count) ** 2 for loss, count in pairs)) / tokens
        results[domain] = {"value": mean, "standard_error": spread, "count": tokens}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = score(
        arguments.model,
        read_rows(arguments.data),
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for domain, result in results.items():
        print(f"{domain:<12} {result['value']:.3f} +- {result['standard_error']:.3f} ({result['count']} prompts)")


if __name__ == "__main__":
    main()
