"""How many tokens vLLM says its cache holds: `cache_size.py < {"models": [{"model": path, ...}]}`.

Writes an entry per model: tokens, tokens of a block, tokens of a sequence, tokens that may be under way, and bytes of the cache; or the
traceback of what ended it. Run like greedy.py, whose way to start an engine in this process it shares.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from greedy import inspect_here


def main() -> None:
    results = os.fdopen(os.dup(1), "w")  # vLLM logs to standard output
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    inspect_here()
    json.dump([size(engine) for engine in asked["models"]], results)
    results.flush()


def size(engine: dict[str, Any]) -> dict[str, int] | str:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni", "skip_tokenizer_init": True,
        "attention_backend": "CPU_MLA",
    }  # fmt: skip
    try:
        llm = LLM(**options | engine)
        config = llm.llm_engine.vllm_config
        return {
            "tokens": config.cache_config.kv_cache_size_tokens,
            "block_tokens": config.cache_config.block_size,
            "context": config.model_config.max_model_len,
            "in_flight": config.max_in_flight_tokens,
            "nbytes": int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) << 30,
        }
    except Exception:
        return traceback.format_exc()
    finally:
        llm = None
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
