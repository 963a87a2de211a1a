"""Greedy continuations by vLLM in one process: `greedy.py < {"models": [{"model": path, ...}], "prompts": [[ids]], "num_tokens": N}`.

Writes one entry per model: the ids that follow each prompt, or the traceback of what ended it. What else stands beside a
model's path goes to vLLM's engine as it is.

Run by the interpreter of the environment that setup.sh makes. A server takes most of a minute to start, a model here a few seconds
after the first, which is what a check that only asks "is the text still the same" should cost.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    results = os.fdopen(os.dup(1), "w")  # vLLM logs to standard output
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    inspect_here()
    answers = [continued(engine, asked["prompts"], asked["num_tokens"]) for engine in asked["models"]]
    json.dump(answers, results)
    results.flush()


def inspect_here() -> None:
    """Have vLLM look at a model's class in this process; in one of its own, for the sake of GPUs, each class costs eight seconds."""
    from vllm.model_executor.models import registry

    def inspect(model: registry._LazyRegisteredModel) -> registry._ModelInfo:
        return registry._ModelInfo.from_model_cls(model.load_model_cls())

    registry._LazyRegisteredModel.inspect_model_cls = inspect


def continued(engine: dict[str, Any], prompts: list[list[int]], num_tokens: int) -> list[list[int]] | str:
    """The token ids after each prompt; the engine and its process groups are gone afterwards, so that another model can follow."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    options = {
        "dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni", "seed": 0, "skip_tokenizer_init": True,
        "max_model_len": max(map(len, prompts)) + num_tokens,
        # Where there is AMX, vLLM prefers latent attention in bfloat16 only; models with other attention pass over this.
        "attention_backend": "CPU_MLA",
    }  # fmt: skip
    parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    try:
        llm = LLM(**options | engine)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
    except Exception:
        return traceback.format_exc()
    finally:
        llm = None
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
