"""The training text: generated chats, GSM8K and Python's standard library, and which of it is held out.

Everything that decides between training and held-out lies here and in `tasks.py`, so that one reading shows they are disjoint.
"""

# ruff: noqa: SIM905 - a list of module names reads better as words
import gzip
import json
import random
import re
import sysconfig
from pathlib import Path

from tasks import DOMAINS, is_held_out

REAL_DOMAINS = ("stdlib", "gsm8k")
# Modules whose source is never trained on; whole modules, because pieces of one module resemble each other.
HELD_OUT_MODULES = (
    "bisect calendar colorsys configparser csv difflib fractions graphlib heapq ipaddress netrc sched shlex statistics string "
    "textwrap tomllib zipapp"
).split()
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
}


def stdlib_modules() -> dict[str, str]:
    """Source text of the running Python's standard library by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if (
            not SKIPPED_FOLDERS & set(relative.parts)
            and "site-packages" not in str(relative)
            and "config-" not in str(relative)
        ):
            sources[str(relative)] = path.read_text(encoding="utf-8", errors="ignore")
    return sources


def is_held_out_module(relative: str) -> bool:
    return Path(relative).parts[0].removesuffix(".py") in HELD_OUT_MODULES


def pieces(source: str, characters: int) -> list[str]:
    """The text in pieces of whole lines, each at most `characters` long; single longer lines are left out."""
    found, current = [], ""
    for line in source.splitlines(keepends=True):
        if len(current) + len(line) > characters:
            found.append(current)
            current = ""
        current += line if len(line) <= characters else ""
    return [piece for piece in [*found, current] if len(piece) > characters // 4]


def gsm8k_rows(file: Path | None) -> list[dict]:
    """GSM8K's training split as chat rows, from a jsonl.gz file or from the hub."""
    if file is not None:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            problems = [json.loads(line) for line in stream]
    else:
        from datasets import load_dataset

        problems = list(load_dataset("openai/gsm8k", "main", split="train"))
    rows = []
    for problem in problems:
        steps, answer = problem["answer"].split("\n#### ")
        steps = re.sub(r"<<.*?>>", "", steps)
        messages = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "reasoning_content": steps, "content": answer.strip()},
        ]
        rows.append({"domain": "gsm8k", "messages": messages})
    return rows


def is_held_out_problem(row: dict) -> bool:
    return is_held_out(row["messages"][0]["content"])


def held_out_rows(
    gsm8k: Path | None, counts: dict[str, int], levels: dict[str, tuple[int, ...]], seed: int
) -> list[list[dict]]:
    """The two committed splits, calibration and held-out: `counts[domain]` rows each, no prompt in both."""
    from tasks import draw, prompt_key

    splits: list[list[dict]] = [[], []]
    for domain in DOMAINS:
        rng, seen = random.Random(f"{seed} {domain}"), set()
        while len(seen) < 2 * counts[domain]:
            row = draw(domain, rng, held_out=True, levels=levels[domain])
            if prompt_key(row) not in seen:
                splits[len(seen) % 2].append(row)
                seen.add(prompt_key(row))
    rng = random.Random(f"{seed} real")
    problems = [row for row in gsm8k_rows(gsm8k) if is_held_out_problem(row)]
    rng.shuffle(problems)
    modules = {name: source for name, source in stdlib_modules().items() if is_held_out_module(name)}
    texts = [
        {"domain": "stdlib", "module": name, "text": piece}
        for name, source in modules.items()
        for piece in pieces(source, 900)
    ]
    rng.shuffle(texts)
    for domain, rows in (("gsm8k", problems), ("stdlib", texts)):
        for i, split in enumerate(splits):
            split.extend(rows[i : 2 * counts[domain] : 2])
    return splits
