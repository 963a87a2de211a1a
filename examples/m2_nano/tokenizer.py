"""The tokenizer: byte-level BPE with single digits, and MiniMax-M2's control tokens under their own names.

Also writes the two committed data splits, because both must exist before training starts.

    python examples/m2_nano/tokenizer.py models/m2-nano --gsm8k FILE
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from corpus import gsm8k_rows, held_out_rows, is_held_out_module, is_held_out_problem, stdlib_modules
from tasks import DOMAINS, draw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
BOS, EOS, ROLE, PAD = "]~!b[", "[e~[", "]~b]", "]!p~["
# Parsers look for these in the decoded text, so they must not vanish with the special tokens.
VISIBLE = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")
COUNTS = {"python": 64, "arithmetic": 64, "tools": 64, "lookup": 64, "stdlib": 48, "gsm8k": 48}
# Harder levels where the easy ones are always solved, since a score of 1 would hide what pruning costs; Python's level 4 goes
# beyond training.
LEVELS = {"python": (3, 3, 3, 3, 4), "arithmetic": (1, 2, 3), "tools": (2, 3, 3), "lookup": (1, 2, 3)}


def sample_texts(gsm8k: Path | None, seed: int) -> Iterator[str]:
    """Text in about the proportions of the training mix."""
    rng = random.Random(seed)
    for domain in DOMAINS:
        for _ in range(4000):
            row = draw(domain, rng)
            yield "\n".join(json.dumps(tool["function"]) for tool in row.get("tools", []))
            for message in row["messages"]:
                yield message.get("reasoning_content", "") + "\n" + message["content"]
                for call in message.get("tool_calls", []):
                    arguments = call["function"]["arguments"].items()
                    lines = [f'<parameter name="{name}">{value}</parameter>\n' for name, value in arguments]
                    yield f'<invoke name="{call["function"]["name"]}">\n{"".join(lines)}</invoke>\n'
    for row in gsm8k_rows(gsm8k):
        if not is_held_out_problem(row):
            yield from (message["content"] + "\n" + message.get("reasoning_content", "") for message in row["messages"])
    for name, source in stdlib_modules().items():
        if not is_held_out_module(name):
            yield source[:12_000]


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, ROLE, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(VISIBLE),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in VISIBLE])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(number): {
            "content": token.content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [ROLE],
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 196608,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gsm8k", type=Path, help="jsonl.gz with question and answer; else the hub's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-only", action="store_true", help="keep the tokenizer, write the splits again")
    arguments = parser.parse_args()
    (arguments.folder / "data").mkdir(parents=True, exist_ok=True)
    if not arguments.data_only:
        write_tokenizer(train_tokenizer(sample_texts(arguments.gsm8k, arguments.seed)), arguments.folder)
    splits = held_out_rows(arguments.gsm8k, COUNTS, LEVELS, arguments.seed)
    for name, rows in zip(("calibration", "heldout"), splits, strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.folder / "data" / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
