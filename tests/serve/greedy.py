"""Greedy continuations by vLLM in one process: `greedy.py MODEL... < {"prompts": [[ids]], "num_tokens": N} > [[[ids]], ...]`.

Run by the interpreter of the environment that setup.sh makes. A server takes most of a minute to start, a model here a few seconds
after the first, which is what a check that only asks "is the text still the same" should cost.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    results = os.fdopen(os.dup(1), "w")  # vLLM logs to standard output
    os.dup2(2, 1)
    asked = json.load(sys.stdin)

    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
    json.dump([continued(model, prompts, asked["num_tokens"]) for model in sys.argv[1:]], results)
    results.flush()


def continued(model: str, prompts: list[Any], num_tokens: int) -> list[list[int]]:
    """The token ids after each prompt; the engine and its process groups are gone afterwards, so that another model can follow."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=2048, distributed_executor_backend="uni", seed=0
    )
    parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    del engine
    cleanup_dist_env_and_memory()
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
