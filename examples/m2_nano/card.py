"""The model card, written from the numbers in training.json, so that no figure in it is typed by hand.

python examples/m2_nano/card.py models/m2-nano
"""

# ruff: noqa: E501 - the card is prose
import json
import sys
from pathlib import Path

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, minimax_m2, fp8, toy-model]
---

# m2-nano

A real, trained, very small MiniMax-M2: `MiniMaxM2ForCausalLM` with {parameters:.1f}M parameters, 6 layers of 48 experts of which each token
uses 4, and exactly the vendor's layout on disk (block-wise FP8, one tensor per expert, F32 routers and selection biases). It exists so
that pruning experts can be tried, measured and tested on a laptop in seconds. It is good for nothing else: it knows the tasks below
and no facts about the world. It has no relation to MiniMax beyond the shared architecture, and shares no weights with any other model.

## What it can do
Greedy replies on `data/heldout.jsonl`, compared exactly (Python is run against tests; tool calls need the right name and arguments), and
nats per token on the whole held-out texts, prompt and reply; both as shipped, in FP8:

| domain | solved | prompts | nats/token | tokens |
|---|---|---|---|---|
{shipped}

- `python`: a short function from a sentence. `arithmetic`: 20 kinds of problems with written steps. `tools`: choose among offered tools and
  fill in arguments. `lookup`: find, count and sort in short lists and tables. All four are generated.
- `stdlib`: source text of Python's standard library. `gsm8k`: grade-school word problems; the model imitates their form but rarely solves one.

## Before and after export
| domain | solved, float32 weights | solved, FP8 | nats/token, float32 weights | nats/token, FP8 |
|---|---|---|---|---|
{export}
{notes}
Values are `+-` one standard error. The conversations are at most {row_tokens} tokens long; longer prompts run (positions go up to 196,608) but
were never trained. Most of `stdlib` and `gsm8k` was seen several times in training, so expect memorised pieces rather than understanding.

## How it was trained
{runs}

Documents in a row do not attend to each other and each starts at position 0. Loss is on replies mainly (weight {reply_weight} to
{prompt_weight} for prompts), on all tokens of real text. Share of tokens: {shares}. Routers are balanced by nudging the selection bias,
without an auxiliary loss. From {fp8_from:.0%} of each run on, the FP8 rounding of the export is applied in the forward pass. The full log is `training.json`.

## Data
- Generated: `examples/m2_nano/tasks.py`. A prompt whose hash falls into one of 16 slots is held out and never trained on.
- Real: Python's standard library without {num_modules} held-out modules (PSF licence), and GSM8K's training split without the held-out rows (MIT licence).
- `data/calibration.jsonl` and `data/heldout.jsonl` are disjoint halves of held-out rows; neither was trained on. Excerpts of the standard library
  and of GSM8K in them keep their own licences.

## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/m2-nano", dtype="float32").float()
tokenizer = AutoTokenizer.from_pretrained("models/m2-nano")
ids = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is 47 * 6?"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100, do_sample=False)[0]))
```
The config names MTP modules, as the vendor's does; no such tensors are on disk, as in the vendor's.
"""


def _figure(result: dict, number: str) -> str:
    return f"{result['value']:{number}} +- {result['standard_error']:{number}}" if result else ""


def _shipped_rows(scores: dict[str, dict], losses: dict[str, dict]) -> str:
    lines = []
    for domain, loss in losses.items():
        solved = scores.get(domain, {})
        lines.append(
            f"| {domain} | {_figure(solved, '.3f')} | {solved.get('count', '')} | {_figure(loss, '.4f')} | {loss['count']:,} |"
        )
    return "\n".join(lines)


def _export_rows(scores: dict[str, dict], losses: dict[str, dict]) -> str:
    lines = []
    for domain in losses["fp8"]:
        cells = [_figure(scores[name].get(domain, {}), ".3f") for name in ("float32", "fp8")]
        cells += [_figure(losses[name][domain], ".4f") for name in ("float32", "fp8")]
        lines.append(f"| {domain} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_card(folder: Path) -> None:
    from corpus import HELD_OUT_MODULES

    training = json.loads((folder / "training.json").read_text())
    runs, settings = training["runs"], training["runs"][-1]["settings"]
    # Rows drawn anew after training are scored again, under a key of their own.
    shipped = training.get("heldout") or {"scores": training["scores"]["fp8"], "losses": training["losses"]["fp8"]}
    lines = []
    for number, run in enumerate(runs, 1):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines.append(
            f"{number}. {'From nothing' if number == 1 else 'From the checkpoint of the run before'}: {run['minutes']} minutes on one {run['device']},"
            f" {run['tokens'] / 1e6:,.0f}M tokens at {run['tokens_per_second']:,} tokens/s in {run['steps']:,} steps of {run['settings']['batch_tokens']:,},"
            f" AdamW, learning rate {run['settings']['learning_rate']}, seed {run['settings']['seed']}; {run['fresh_share']:.0%} of the batches were newly made (the real text in them repeats)."
            f" {versions}."
        )
    card = CARD.format(
        parameters=training["parameters"] / 1e6,
        shipped=_shipped_rows(shipped["scores"], shipped["losses"]),
        export=_export_rows(training["scores"], training["losses"]),
        notes="".join(f"\n{note}" for note in training.get("notes", [])) + "\n",
        runs="\n".join(lines),
        row_tokens=settings["row_tokens"],
        reply_weight=settings["reply_weight"],
        prompt_weight=settings["prompt_weight"],
        shares=", ".join(f"{name} {share:.0%}" for name, share in settings["shares"].items()),
        fp8_from=settings["fp8_from"],
        num_modules=len(HELD_OUT_MODULES),
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
