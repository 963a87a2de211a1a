"""What servers call the way in which each family writes tool calls and reasoning: data only.

Names are those of vLLM 0.32.0 and SGLang 0.5.23; which parser reads which family is the vendors' own word in their cards.
`make serve-check` holds vLLM's names to the installed vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """How the models of some families write.

    Attributes:
        model_types: values of `model_type` in config.json.
        tools, reasoning: vLLM's names of the parsers, None where there is none.
        marker: what stands in the chat template of these models and not in that of their siblings; None for all that are left.
        thinks: what stands in the chat template of those that reason; None where all do. A reasoning parser that waits for an end of
            thinking takes the whole answer of a model that never thinks for reasoning.
    """

    model_types: tuple[str, ...]
    tools: str | None
    reasoning: str | None = None
    marker: str | None = None
    thinks: str | None = None


# The first that fits counts.
DIALECTS: tuple[Dialect, ...] = (
    Dialect(("minimax_m2",), "minimax_m2", "minimax_m2_append_think"),
    Dialect(("minimax_m3_vl",), "minimax_m3", "minimax_m3"),
    # Qwen3-Coder writes calls as XML, its siblings as JSON.
    Dialect(("qwen3_moe",), "qwen3_coder", marker="<function="),
    Dialect(("qwen3_moe", "qwen3_vl_moe", "qwen3_next"), "hermes", "qwen3", thinks="think>"),
    Dialect(("qwen3_5_moe", "qwen3_5_moe_text"), "qwen3_coder", "qwen3", thinks="think>"),
    # GLM-4.7 leaves out the line break after a call's name.
    Dialect(("glm4_moe",), "glm47", "glm47", marker="<tool_call>{function-name}<arg_key>"),
    Dialect(("glm4_moe_lite", "glm_moe_dsa"), "glm47", "glm47"),
    Dialect(("glm4_moe", "glm4v_moe"), "glm45", "glm45"),
    # V3.1 left out the fences of code that V3 and R1 write calls in, and asks for thinking by a variable.
    Dialect(("deepseek_v3",), "deepseek_v31", "deepseek_v3", marker="if not thinking is defined"),
    Dialect(("deepseek_v3",), "deepseek_v3", "deepseek_r1", thinks="</think>"),
    Dialect(("deepseek_v32",), "deepseek_v32", "deepseek_v3"),
    Dialect(("kimi_k2", "kimi_k25"), "kimi_k2", "kimi_k2", thinks="think>"),
    Dialect(("gpt_oss",), "openai", "openai_gptoss"),
    Dialect(("llama4", "llama4_text"), "llama4_pythonic"),
    Dialect(("ernie4_5_moe",), "ernie45", "ernie45", thinks="think>"),
    Dialect(("hunyuan_v1_moe",), "hunyuan_a13b", "hunyuan_a13b"),
    Dialect(("granitemoehybrid",), "granite4"),
    Dialect(("granitemoe", "granitemoeshared"), "granite"),
    Dialect(("jamba",), "jamba"),
    Dialect(("lfm2_moe",), "lfm2"),
    Dialect(("longcat_flash",), "longcat"),
    Dialect(("mimo_v2_flash",), "mimo", "mimo"),
    Dialect(("dots1",), "dots"),
    Dialect(("step3p5", "step3p7"), "step3p5", "step3p5"),
    Dialect(("nemotron_h",), "qwen3_coder", "nemotron_v3", thinks="think>"),
    Dialect(("gemma4",), "gemma4", "gemma4"),
    Dialect(("mixtral",), "mistral"),
    Dialect(("bailing_hybrid",), "ling3", "ling3"),
)

# SGLang's name for what vLLM calls so, of tools and of reasoning; what is not here it does not read.
SGLANG_TOOLS = {
    "minimax_m2": "minimax-m2", "minimax_m3": "minimax-m3", "hermes": "qwen25", "qwen3_coder": "qwen3_coder", "glm45": "glm45",
    "glm47": "glm47", "deepseek_v3": "deepseekv3", "deepseek_v31": "deepseekv31", "deepseek_v32": "deepseekv32", "kimi_k2": "kimi_k2",
    "openai": "gpt-oss", "llama4_pythonic": "pythonic", "hunyuan_a13b": "hunyuan", "lfm2": "lfm2", "mimo": "mimo", "dots": "dots",
    "step3p5": "step3p5", "gemma4": "gemma4", "mistral": "mistral", "ling3": "ling3",
}  # fmt: skip
SGLANG_REASONING = {
    "minimax_m2_append_think": "minimax-append-think", "minimax_m3": "minimax-m3", "qwen3": "qwen3", "glm45": "glm45", "glm47": "glm45",
    "deepseek_r1": "deepseek-r1", "deepseek_v3": "deepseek-v3", "kimi_k2": "kimi_k2", "openai_gptoss": "gpt-oss",
    "hunyuan_a13b": "hunyuan", "mimo": "mimo", "step3p5": "step3p5", "nemotron_v3": "nemotron_3", "gemma4": "gemma4", "ling3": "ling3",
}  # fmt: skip

# Families whose model classes in vLLM 0.32 can hold experts twice and move them between GPUs (--enable-eplb): those that name the protocol
# MixtureOfExperts. MiniMax-M2's and gpt-oss's do not.
BALANCES_EXPERTS = frozenset({
    "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "glm_moe_dsa", "kimi_k2", "mixtral", "llama4", "llama4_text", "ernie4_5_moe", "lfm2_moe", "afmoe", "nemotron_h",
    "step3p5", "mimo_v2_flash", "gemma4",
})  # fmt: skip


def reads_template(model_type: str) -> bool:
    """Whether the dialect of a family depends on the chat template."""
    rows = [row for row in DIALECTS if model_type in row.model_types]
    return any(row.marker is not None or row.thinks is not None for row in rows)


def find(model_type: str, template: str | None) -> Dialect | None:
    """The dialect of a family by its chat template; without one, that of the family's rows that ask for no marker."""
    for row in DIALECTS:
        if model_type in row.model_types and (row.marker is None or (template is not None and row.marker in template)):
            if row.thinks is not None and template is not None and row.thinks not in template:
                return Dialect(row.model_types, row.tools, None)
            return row
    return None
