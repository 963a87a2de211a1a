"""What every check of serving shares: where vLLM is, how it is run, and what its text is held against."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
VLLM = Path(os.environ.get("REAPKIT_SERVE_VENV", REPOSITORY / ".venv-vllm")) / "bin"

# Low enough that no sigmoid brings an expert back, finite so that no engine meets inf - inf.
NEVER_CHOSEN = -1e9

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",  # so small a model spends more on waiting for threads than it gains from them
}

Continuations = list[list[int]]


def require_vllm() -> None:
    """Skip where there is no vLLM; fail instead where REAPKIT_REQUIRE_SERVE is 1."""
    if not (VLLM / "vllm").exists():
        missing = f"no vLLM in {VLLM.parent}; tests/serve/setup.sh makes it"
        if os.environ.get("REAPKIT_REQUIRE_SERVE") == "1":
            pytest.fail(missing)
        pytest.skip(missing)


def greedy(
    models: Sequence[dict[str, Any]], prompts: Continuations, num_tokens: int, *, within_s: float, **environment: str
) -> list[Continuations | str]:
    """What greedy.py answers for each model: the ids after each prompt, or the exception that ended it."""
    done = subprocess.run(
        [VLLM / "python", HERE / "greedy.py"],
        input=json.dumps({"models": models, "prompts": prompts, "num_tokens": num_tokens}, default=str),
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=within_s,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


def continued(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The most likely tokens, one after the other, past any end of turn, as a transformers model has them.

    A loop over argmax rather than `generate`, whose defaults (sampling, stops, penalties) come from the checkpoint's files.
    """
    tokens: list[int] = []
    step, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = model(step, past_key_values=cache, use_cache=True)
            step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            tokens.append(step.item())
    return tokens


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as in ENVIRONMENT."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
