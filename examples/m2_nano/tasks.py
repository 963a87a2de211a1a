"""The four generated domains of m2-nano behind one function, and the split that keeps held-out prompts out of training.

The split is a property of the prompt, not of a file: a prompt whose hash falls into one of 16 slots is held out, for every seed.
"""

import hashlib
import json
import random

import arithmetic
import lookups
import programs
import toolcalls

DOMAINS = ("python", "arithmetic", "tools", "lookup")
HELD_OUT_SLOTS = 16


def prompt_key(row: dict) -> str:
    """What identifies a prompt: the first request, and the tools on offer without their order."""
    tools = sorted(json.dumps(tool, sort_keys=True) for tool in row.get("tools", []))
    return json.dumps([row["messages"][0]["content"], tools])


def is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SLOTS == 0


def draw(domain: str, rng: random.Random, *, held_out: bool = False, levels: tuple[int, ...] = (1, 2, 3)) -> dict:
    """One row of `domain` from the asked side of the split; held-out rows carry what is needed to score a reply."""
    while True:
        level = rng.choice(levels)
        if domain == "python":
            row = programs.draw(rng, level, tests=held_out)
        elif domain == "arithmetic":
            row = arithmetic.draw(rng, level)
        elif domain == "tools":
            row = toolcalls.draw(rng, level)
        elif domain == "lookup":
            row = lookups.draw(rng, level)
        else:
            raise ValueError(f"no domain {domain!r}: there are {', '.join(DOMAINS)}")
        if is_held_out(prompt_key(row)) == held_out:
            return {"domain": domain, "level": level, **row}
