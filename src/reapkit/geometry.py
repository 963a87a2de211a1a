"""What an engine must hold for every token and sequence, by a model's config.json alone; nothing of it depends on the number of experts.

Which kinds of attention a family mixes, and what each keeps, is as vLLM 0.32 reads the same entries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reapkit.checkpoint import text_section

Kind = Literal["full", "sliding", "chunked", "latent", "index", "state"]

# Recurrent states are float32 unless an engine is told otherwise; some engines keep them in bfloat16, so that this errs high.
_STATE_BYTES = 4
# A key of sparse attention's indexer is FP8 with an F32 scale for each 128 of its values.
_INDEX_BLOCK = 128

# Families whose single `sliding_window` counts for every layer.
_ALL_SLIDING = ("mixtral", "phimoe")


@dataclass(frozen=True)
class CacheLayers:
    """Layers that keep the same of a sequence.

    Attributes:
        kind: `full` keeps keys and values of every token; `sliding` and `chunked` of the last `window`; `latent` one compressed vector per
            token; `index` the keys by which sparse attention chooses; `state` something of fixed size.
        num_layers: how many.
        heads: key-value heads, which tensor parallelism divides; 1 for what every GPU holds whole.
        values: per token and head, keys and values together; for `state` all values of a sequence.
        window: tokens, where not all stay.
        fixed_bytes: of a value, where that does not follow the cache's dtype.
    """

    kind: Kind
    num_layers: int
    heads: int
    values: int
    window: int | None = None
    fixed_bytes: float | None = None


@dataclass(frozen=True)
class Geometry:
    """What of a model's shape decides how it can be served.

    Attributes:
        hidden_size, vocab_size: of the language model.
        expert_size: width of one expert.
        num_heads: query heads.
        num_kv_heads: key-value heads of plain attention, 0 where attention is latent throughout.
        cache: what the layers keep, by kind; empty where config.json does not say it in a way that is known.
        replicated_values: weights per layer of latent attention that every GPU holds whole.
        absorbed_values: per layer of latent attention, the up-projections that vLLM keeps a second time, in bfloat16, divided among GPUs.
        tied: whether the head is the embedding.
        needs_own_code: whether config.json names Python code of the checkpoint's own.
    """

    hidden_size: int
    vocab_size: int
    expert_size: int
    num_heads: int
    num_kv_heads: int
    cache: tuple[CacheLayers, ...]
    replicated_values: int = 0
    absorbed_values: int = 0
    tied: bool = False
    needs_own_code: bool = False


def read(config: Mapping[str, Any], num_layers: int) -> Geometry | None:
    """The geometry of a model with so many decoder layers; None where config.json lacks a size that every engine needs."""
    text = text_section(config)
    heads = _first(text, "num_attention_heads", "n_heads")
    hidden = _first(text, "hidden_size", "d_model")
    vocab = _first(text, "vocab_size")
    width = _expert_size(text)
    if not (heads and hidden and vocab and width):
        return None
    latent, rope = _first(text, "kv_lora_rank"), _first(text, "qk_rope_head_dim")
    cache = _cache(str(config.get("model_type")), text, num_layers)
    replicated = absorbed = 0
    if latent and rope:
        replicated = hidden * (latent + rope + (_first(text, "q_lora_rank") or 0))
        absorbed = heads * latent * ((_first(text, "qk_nope_head_dim") or 0) + (_first(text, "v_head_dim") or 0))
    plain = [layers.heads for layers in cache if layers.kind in ("full", "sliding", "chunked")]
    return Geometry(
        hidden_size=hidden,
        vocab_size=vocab,
        expert_size=width,
        num_heads=heads,
        num_kv_heads=min(plain) if plain else 0,
        cache=cache,
        replicated_values=replicated,
        absorbed_values=absorbed,
        tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings")) is True,
        needs_own_code="auto_map" in config,
    )


def _first(table: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these entries that is a positive whole number."""
    return next((table[key] for key in keys if type(table.get(key)) is int and table[key] > 0), None)


def _expert_size(text: Mapping[str, Any]) -> int | None:
    for table in (text, text.get("ffn_config")):
        if isinstance(table, dict):
            for key in ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size"):
                value = table.get(key)
                value = value[0] if isinstance(value, list) and value else value
                if type(value) is int and value > 0:
                    return value
    return None


def _cache(model_type: str, text: Mapping[str, Any], num_layers: int) -> tuple[CacheLayers, ...]:
    kinds = _kinds(model_type, text, num_layers)
    if kinds is None:
        return ()
    shared = _first(text, "num_kv_shared_layers") or 0
    counts = Counter(kinds[: num_layers - shared])
    found: list[CacheLayers] = []
    # LongCat-Flash has two attentions in a layer.
    per_layer = 2 if model_type == "longcat_flash" else 1
    for kind in ("full", "sliding", "chunked", "state"):
        if count := counts[kind]:
            layers = _layers(model_type, text, kind, count * per_layer)
            if not layers:
                return ()
            found += layers
    return tuple(found)


def _layers(model_type: str, text: Mapping[str, Any], kind: str, count: int) -> list[CacheLayers]:
    """What so many layers of a kind keep; empty where the config does not say."""
    if kind == "state":
        values = _state_values(model_type, text)
        return [CacheLayers("state", count, 1, values, fixed_bytes=_STATE_BYTES)] if values else []
    latent, rope = _first(text, "kv_lora_rank"), _first(text, "qk_rope_head_dim")
    if latent and rope:
        found = [CacheLayers("latent", count, 1, latent + rope)]
        if index := _first(text, "index_head_dim"):
            scales = 4 * math.ceil(index / _INDEX_BLOCK)
            found.append(CacheLayers("index", count, 1, index, fixed_bytes=(index + scales) / index))
        return found
    heads, size, value_size = _heads(model_type, text, sliding=kind == "sliding")
    if not heads or not size:
        return []
    values = size + (value_size or size)
    if kind == "full":
        return [CacheLayers("full", count, heads, values)]
    window = (
        _first(text, "attention_chunk_size")
        if kind == "chunked"
        else _first(text, "sliding_window", "sliding_window_size")
    )
    return [CacheLayers("chunked" if kind == "chunked" else "sliding", count, heads, values, window)] if window else []


def _heads(model_type: str, text: Mapping[str, Any], *, sliding: bool) -> tuple[int | None, int | None, int | None]:
    """Key-value heads, and the sizes of their keys and values where values have another."""
    own = text.get("attn_config") if isinstance(text.get("attn_config"), dict) else text
    heads = _first(own, "num_key_value_heads", "num_attention_groups", "kv_n_heads", "num_attention_heads")  # type: ignore[arg-type]
    queries, hidden = _first(text, "num_attention_heads", "n_heads"), _first(text, "hidden_size", "d_model")
    size = _first(text, "head_dim", "attention_head_dim") or (hidden // queries if hidden and queries else None)
    value_size = _first(text, "v_head_dim")
    other = text.get("attention_other_setting")
    if sliding:
        heads = _first(text, "swa_num_key_value_heads") or heads
        size, value_size = _first(text, "swa_head_dim") or size, _first(text, "swa_v_head_dim") or value_size
        if isinstance(other, dict):
            heads, size = _first(other, "num_attention_groups") or heads, _first(other, "head_dim") or size
    elif model_type == "gemma4":
        heads = _first(text, "num_global_key_value_heads") or heads
        size = _first(text, "global_head_dim") or size
    return heads, size, value_size


_KIND_OF_WORD = {
    "full_attention": "full", "attention": "full", "*": "full", "sliding_attention": "sliding", "chunked_attention": "chunked",
    "linear_attention": "state", "mamba": "state", "conv": "state", "M": "state",
    "moe": "none", "mlp": "none", "E": "none", "-": "none",
}  # fmt: skip


def _kinds(model_type: str, text: Mapping[str, Any], num_layers: int) -> list[str] | None:
    """What every decoder layer is: `full`, `sliding`, `chunked`, `state`, or `none` without attention; None where that is not known."""
    everywhere = range(num_layers)
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        words = text.get(key)
        if isinstance(words, list | str) and len(words) >= num_layers:
            kinds = [_KIND_OF_WORD.get(word) for word in words[:num_layers]]
            return None if None in kinds else [str(kind) for kind in kinds]
    if isinstance(numbers := text.get("attn_type_list"), list) and len(numbers) >= num_layers:
        return ["full" if number == 1 else "state" for number in numbers[:num_layers]]
    if isinstance(numbers := text.get("hybrid_layer_pattern"), list) and len(numbers) >= num_layers:
        return ["sliding" if number == 1 else "full" for number in numbers[:num_layers]]
    if isinstance(linear := text.get("linear_attn_config"), dict) and isinstance(linear.get("full_attn_layers"), list):
        return ["full" if index + 1 in linear["full_attn_layers"] else "state" for index in everywhere]
    if model_type == "gpt_oss":
        return ["full" if index % 2 else "sliding" for index in everywhere]
    if model_type in ("llama4", "llama4_text"):
        no_rope = text.get("no_rope_layers")
        marks: Sequence[Any] = no_rope if no_rope else [int((index + 1) % 4 != 0) for index in everywhere]
        return ["chunked" if marks[index] and text.get("attention_chunk_size") else "full" for index in everywhere]
    if interval := _first(text, "full_attention_interval"):
        return ["state" if (index + 1) % interval else "full" for index in everywhere]
    if period := _first(text, "attn_layer_period"):
        offset = text.get("attn_layer_offset")
        return ["full" if index % period == offset else "state" for index in everywhere]
    if model_type in ("bailing_hybrid", "bailing_moe_linear", "minimax", "minimax_m1", "minimax_text_01"):
        return None
    if model_type in _ALL_SLIDING and _first(text, "sliding_window") and text.get("use_sliding_window") is not False:
        return ["sliding"] * num_layers
    return ["full"] * num_layers


def _state_values(model_type: str, text: Mapping[str, Any]) -> int | None:
    """Values of a sequence's state in one layer of linear attention, of a state space model or of a short convolution."""

    def size(*keys: str) -> int:
        return _first(text, *keys) or 0

    if keys := size("linear_num_key_heads"):  # gated delta net
        key, value, values = size("linear_key_head_dim"), size("linear_value_head_dim"), size("linear_num_value_heads")
        conv = (2 * keys * key + values * value) * (size("linear_conv_kernel_dim") - 1)
        return conv + values * key * value
    if isinstance(linear := text.get("linear_attn_config"), dict):  # Kimi's delta attention
        heads, head = _first(linear, "num_heads") or 0, _first(linear, "head_dim") or 0
        return 3 * heads * head * ((_first(linear, "short_conv_kernel_size") or 1) - 1) + heads * head * head
    if model_type.startswith("minimax"):  # lightning attention
        return size("num_attention_heads") * size("head_dim") ** 2
    if heads := size("mamba_num_heads", "mamba_n_heads"):  # Mamba 2
        head, state = size("mamba_head_dim", "mamba_d_head"), size("ssm_state_size", "mamba_d_state")
        groups, kernel = size("n_groups", "mamba_n_groups"), size("conv_kernel", "mamba_d_conv")
        return (heads * head + 2 * groups * state) * (kernel - 1) + heads * head * state
    if state := size("mamba_d_state"):  # Mamba 1
        inner = size("mamba_expand") * size("hidden_size")
        return inner * (size("mamba_d_conv") - 1) + inner * state
    if kernel := size("conv_L_cache"):  # short convolution
        return size("conv_dim", "hidden_size") * (kernel - 1)
    return None
