"""Whether a model fits on some cards, and for how many sequences of what length: arithmetic on an inventory, no device.

All sizes are bytes on the card that holds most. Weights are what is on disk; what an engine adds while it runs is an allowance whose parts
are named here. Nothing below was fitted to a measurement: allowances err high, so that what is said to fit does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from reapkit.errors import UnsupportedError, UsageError, did_you_mean
from reapkit.geometry import CacheLayers, Geometry
from reapkit.gpus import GIB, Gpu, recognize
from reapkit.inventory import Inventory
from reapkit.plans import num_kept

# A card's own share of a running engine that does not depend on the model: the CUDA context (about half a GiB), NCCL's and the custom
# all-reduce's buffers (one GiB on eight cards), captured CUDA graphs (a GiB at vLLM's default sizes). Too much costs a few sequences.
RUNTIME_BYTES = int(2.5 * GIB)
# Hidden states of a step that are alive at once besides the experts': residual, normed, attention's projections and output.
LIVE_HIDDEN = 8
# Logits of every sequence in float32, and a sorted copy of them while sampling.
LOGIT_COPIES = 2
# The REAP paper goes as far as half of the experts; what is left of a model beyond that is nobody's measurement.
MOST_REMOVED = 0.5
# Tokens of a block of the cache: vLLM's default on GPUs.
BLOCK_TOKENS = 16
# Steps that are prepared while others run: vLLM schedules one ahead.
STEPS_AHEAD = 1
# bf16 of hidden states and, unless asked otherwise, of the cache.
ACTIVATION_BYTES = 2
KV_DTYPES: Mapping[str, int] = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
# A vocabulary is padded to a multiple of this before it is divided.
VOCAB_PADDING = 64


@dataclass(frozen=True)
class Parallel:
    """How a model is spread over cards.

    Attributes:
        tensor: cards that share every layer.
        pipeline: stages of `tensor` cards each, which share the layers.
        experts: whether the cards of a stage share whole experts, and not slices of every one.
    """

    tensor: int = 1
    pipeline: int = 1
    experts: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Capacity:
    """What one card of a deployment holds, in bytes.

    Attributes:
        gpu, parallel: the deployment.
        num_experts: experts per layer.
        usable: what the engine may take of the card.
        weights: on the card with most.
        overhead: allowance for what a running engine takes besides.
        cache: what is left for the KV cache; negative where weights and overhead alone are too much.
        context: tokens per sequence asked for.
        per_token: bytes of cache that one more token of a long sequence takes.
        per_sequence: bytes of cache that a sequence of `context` tokens takes.
        max_num_seqs: sequences of `context` tokens that fit at once.
        max_context: the longest single sequence that fits, at most `context`.
        cached_tokens: tokens that the cache holds in sequences of `context` tokens, as vLLM counts when it starts.
    """

    gpu: Gpu
    parallel: Parallel
    num_experts: int
    usable: int
    weights: int
    overhead: int
    cache: int
    context: int
    per_token: int
    per_sequence: int
    max_num_seqs: int
    max_context: int
    cached_tokens: int

    @property
    def fits(self) -> bool:
        """Whether one sequence of full length does."""
        return self.max_num_seqs >= 1

    @property
    def missing(self) -> int:
        """Bytes that lack for one sequence of full length; 0 where it fits."""
        return max(0, self.per_sequence - self.cache)

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "gpus": self.parallel.gpus,
            "tensor_parallel": self.parallel.tensor,
            "pipeline_parallel": self.parallel.pipeline,
            "expert_parallel": self.parallel.experts,
            "num_experts": self.num_experts,
            "usable_bytes": self.usable,
            "weight_bytes": self.weights,
            "overhead_bytes": self.overhead,
            "cache_bytes": self.cache,
            "cache_bytes_per_token": self.per_token,
            "context": self.context,
            "cache_bytes_per_sequence": self.per_sequence,
            "max_num_seqs": self.max_num_seqs,
            "max_context": self.max_context,
            "cached_tokens": self.cached_tokens,
            "fits": self.fits,
            "missing_bytes": self.missing,
        }


def found(count: int | None = None) -> tuple[Gpu | None, int]:
    """The cards of this machine, the kind of the first one and how many there are of it, or `count`; None where there are none."""
    import torch

    if not torch.cuda.is_available():
        return None, 1 if count is None else count
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    same = sum(other.name == properties[0].name for other in properties)
    return recognize(properties[0].name, int(properties[0].total_memory)), same if count is None else count


@dataclass(frozen=True)
class Demand:
    """What is asked of a deployment.

    Attributes:
        context: tokens per sequence; None for the model's own.
        kv_dtype: one of `KV_DTYPES`.
        utilization: share of a card that the engine may take; None for the card's own default.
    """

    context: int | None = None
    kv_dtype: str = "auto"
    utilization: float | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(
                f"there is no KV cache dtype {self.kv_dtype!r}", hint=did_you_mean(self.kv_dtype, KV_DTYPES)
            )
        if self.context is not None and self.context < 1:
            raise UsageError(f"--max-model-len {self.context} is no length", hint="give a number of tokens")
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise UsageError(
                f"--gpu-memory-utilization {self.utilization} is not a share of the memory", hint="for example 0.92"
            )


def require_geometry(inventory: Inventory) -> Geometry:
    """The inventory's geometry.

    Raises:
        UnsupportedError: config.json does not say what attention keeps in a way that is known.
    """
    if inventory.geometry is None or not inventory.geometry.cache:
        raise UnsupportedError(
            f"what a token of {inventory.architecture} takes in the KV cache does not follow from config.json",
            hint="serve it without --gpu and read the engine's own line 'KV cache size'",
        )
    return inventory.geometry


def spread(inventory: Inventory, gpus: int) -> Parallel:
    """The usual way to spread a model over so many cards: over all of them by tensor parallelism where heads divide, else in stages.

    Experts stay whole where their width, in blocks that share a scale, does not divide.

    Raises:
        UsageError: no cards.
    """
    if gpus < 1:
        raise UsageError(f"--count {gpus} is no number of cards", hint="--count 1 or more")
    geometry = inventory.geometry
    if geometry is None:
        return Parallel(gpus)
    tensor = next(size for size in range(gpus, 0, -1) if gpus % size == 0 and _divides(geometry, size))
    return Parallel(tensor, gpus // tensor, tensor > 1 and not expert_slices_fit(inventory, tensor))


def _divides(geometry: Geometry, size: int) -> bool:
    kv = geometry.num_kv_heads
    return geometry.num_heads % size == 0 and (kv == 0 or kv % size == 0 or size % kv == 0)


def expert_slices_fit(inventory: Inventory, tensor: int) -> bool:
    """Whether every expert can be cut into so many slices, whole blocks of one scale each."""
    geometry = inventory.geometry
    block = inventory.block[0] if inventory.block else 1
    return geometry is None or geometry.expert_size % (tensor * block) == 0


def capacity(
    inventory: Inventory, gpu: Gpu, parallel: Parallel, demand: Demand | None = None, *, num_experts: int | None = None
) -> Capacity:
    """What a card of the deployment holds.

    Args:
        inventory: of the checkpoint.
        gpu, parallel: the cards and how the model is spread over them.
        demand: context, dtype of the cache, share of the card.
        num_experts: experts per layer, where others are to be imagined than there are.

    Raises:
        UnsupportedError: config.json does not say what attention keeps, or how long sequences may be.
    """
    demand = demand or Demand()
    geometry = require_geometry(inventory)
    context = demand.context or inventory.context_length
    if context is None:
        raise UnsupportedError("config.json does not say how long sequences may be", hint="give --max-model-len")
    kept = inventory.num_experts if num_experts is None else num_experts
    usable = int(gpu.nbytes * (demand.utilization or gpu.utilization))
    weights = weight_bytes(inventory, parallel, kept)
    overhead = overhead_bytes(geometry, gpu, parallel, inventory.top_k)
    cache = usable - weights - overhead
    value = KV_DTYPES[demand.kv_dtype]

    blocks = pool(geometry, parallel, value_bytes=value)
    in_flight = (parallel.pipeline + STEPS_AHEAD) * gpu.max_batched_tokens

    def per_sequence(tokens: int) -> int:
        return blocks.sequence_bytes(tokens, in_flight=in_flight)

    fits = cache >= per_sequence(1)
    low, high = (1, context) if fits else (0, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if per_sequence(middle) <= cache else (low, middle - 1)
    return Capacity(
        gpu=gpu,
        parallel=parallel,
        num_experts=kept,
        usable=usable,
        weights=weights,
        overhead=overhead,
        cache=cache,
        context=context,
        per_token=token_bytes(geometry, parallel, value_bytes=value),
        per_sequence=per_sequence(context),
        max_num_seqs=max(0, cache) // per_sequence(context),
        max_context=low,
        cached_tokens=blocks.cached_tokens(cache, context, in_flight=in_flight),
    )


def over_ratios(
    inventory: Inventory, gpu: Gpu, gpus: int, ratios: tuple[str, ...], demand: Demand | None = None
) -> Iterator[tuple[str, Capacity]]:
    """The capacity with every share of the experts removed, as far as as many are left as each token is routed to."""
    parallel = spread(inventory, gpus)
    for ratio in ratios:
        kept = num_kept(inventory.num_experts, ratio=ratio, num_groups=inventory.num_groups)
        if kept >= inventory.top_k:
            yield ratio, capacity(inventory, gpu, parallel, demand, num_experts=kept)


# --- weights


def weight_bytes(inventory: Inventory, parallel: Parallel, num_experts: int) -> int:
    """Bytes of weights on the card that holds most, with so many experts per layer.

    Tensor parallelism divides attention, experts, shared experts, dense layers and embeddings; routers and norms are on every card. In
    families with recurrent layers what is neither is theirs, and divided too. MTP layers are not loaded unless they draft.
    """
    geometry = inventory.geometry
    tensor = parallel.tensor
    sizes = {part.name: part.nbytes for part in inventory.parts}
    parameters = {part.name: part.parameters for part in inventory.parts}
    # The heaviest stage has as many layers as any, and of those with experts as many as it can.
    layers = stage_layers(inventory.num_layers, parallel.pipeline)
    share = Fraction(layers, inventory.num_layers)
    moe_share = Fraction(min(layers, inventory.moe_layers), inventory.moe_layers)

    experts = Fraction(sizes["experts"], inventory.num_experts)
    total = (
        experts * moe_share * (math.ceil(num_experts / tensor) if parallel.experts else Fraction(num_experts, tensor))
    )
    total += Fraction(sizes.get("routers", 0) * num_experts, inventory.num_experts) * moe_share
    total += Fraction(sizes.get("shared experts", 0), tensor) * moe_share
    total += Fraction(sizes.get("dense layers", 0), tensor) * share
    recurrent = geometry is not None and any(layer.kind == "state" for layer in geometry.cache)
    total += Fraction(sizes.get("norms and other", 0), tensor if recurrent else 1) * share

    attention, values = sizes.get("attention", 0), parameters.get("attention", 0)
    whole = Fraction(0)
    if geometry is not None and values:
        each = Fraction(attention, values)
        latent = sum(layer.num_layers for layer in geometry.cache if layer.kind == "latent")
        whole += each * geometry.replicated_values * latent
        # Fewer key-value heads than cards: every card has one of them whole.
        for layer in geometry.cache:
            if layer.kind in ("full", "sliding", "chunked") and layer.heads < tensor:
                projections = each * layer.num_layers * geometry.hidden_size * layer.heads * layer.values
                whole += projections * (Fraction(1, layer.heads) - Fraction(1, tensor)) / (1 - Fraction(1, tensor))
        total += Fraction(ACTIVATION_BYTES * geometry.absorbed_values * latent, tensor) * share
    total += (whole + (attention - whole) / tensor) * share

    embeddings = Fraction(sizes.get("embeddings", 0), tensor)
    if parallel.pipeline > 1 and not (geometry is not None and geometry.tied):
        embeddings /= 2  # the first stage has the embedding, the last one the head
    return math.ceil(total + embeddings)


def stage_layers(num_layers: int, pipeline: int) -> int:
    """Layers of the stage that has most."""
    return math.ceil(num_layers / pipeline)


def overhead_bytes(geometry: Geometry, gpu: Gpu, parallel: Parallel, top_k: int) -> int:
    """What a running engine takes on a card besides weights and cache: its runtime, the activations of its largest step, and the logits."""
    width = geometry.expert_size if parallel.experts else math.ceil(geometry.expert_size / parallel.tensor)
    # Of every token as many copies as it has experts: the gate's and the up-projection's output, their product, the experts' output.
    routed = top_k * (3 * width + geometry.hidden_size)
    # With whole experts a card may get all tokens of a step: its buffers are for that.
    activations = gpu.max_batched_tokens * (routed + LIVE_HIDDEN * geometry.hidden_size) * ACTIVATION_BYTES
    vocab = math.ceil(geometry.vocab_size / VOCAB_PADDING) * VOCAB_PADDING
    # Sampling sees the logits of all cards, gathered.
    logits = gpu.max_num_seqs * vocab * 4 * LOGIT_COPIES
    return RUNTIME_BYTES + activations + logits


# --- the cache


def token_bytes(geometry: Geometry, parallel: Parallel, *, value_bytes: int) -> int:
    """Bytes of cache on a card that one more token of a long sequence takes."""
    growing = [layer for layer in geometry.cache if layer.window is None and layer.kind != "state"]
    return sum(
        math.ceil(layer.num_layers / parallel.pipeline) * _page_bytes(layer, parallel.tensor, value_bytes, 1)
        for layer in growing
    )


@dataclass(frozen=True)
class Pool:
    """The blocks of a cache, all of one size, on one card.

    Attributes:
        block_bytes: of a block, for all layers of a group.
        groups: for each group of layers, what it keeps, and the tokens of its blocks.
    """

    block_bytes: int
    groups: tuple[tuple[CacheLayers, int], ...]

    def blocks(self, tokens: int, *, in_flight: int) -> int:
        """Blocks that a sequence takes; sliding windows keep the tokens of the steps that are under way, too."""
        return sum(_blocks(layer, tokens, in_flight, block_tokens) for layer, block_tokens in self.groups)

    def sequence_bytes(self, tokens: int, *, in_flight: int) -> int:
        """Bytes that a sequence takes."""
        return self.blocks(tokens, in_flight=in_flight) * self.block_bytes

    def cached_tokens(self, nbytes: int, context: int, *, in_flight: int) -> int:
        """Tokens of sequences of full length that a cache holds: what vLLM says when it starts, `KV cache size: N tokens`."""
        blocks = max(0, nbytes) // self.block_bytes
        return int(blocks / self.blocks(context, in_flight=in_flight) * context)


def pool(geometry: Geometry, parallel: Parallel, *, value_bytes: int, block_tokens: int = BLOCK_TOKENS) -> Pool:
    """How vLLM divides a card's cache.

    Where layers keep different things it puts equally many of one kind in a group, pads the last group, and gives every group blocks of one
    size (`_get_kv_cache_groups_uniform_page_size`): layers with smaller heads get longer blocks, and attention's blocks are made longer
    until one holds as much as a state.

    Args:
        geometry: of the model.
        parallel: how it is spread.
        value_bytes: of a value in the cache.
        block_tokens: tokens of a block.
    """
    main = [layer for layer in geometry.cache if layer.kind != "index"]
    # Kinds alternate, so that every stage has its share of each.
    counts = [math.ceil(layer.num_layers / parallel.pipeline) for layer in main]
    pages = [_page_bytes(layer, parallel.tensor, value_bytes, block_tokens) for layer in main]
    attention = [size for layer, size in zip(main, pages, strict=True) if layer.kind != "state"]
    page = max(attention, default=max(pages))
    page *= math.ceil(max(pages) / page)
    group = _group_size(counts)
    groups = []
    for layer, count, size in zip(main, counts, pages, strict=True):
        tokens_of_block = block_tokens if layer.kind == "state" else block_tokens * (page // size)
        groups += [(layer, tokens_of_block)] * math.ceil(count / group)
    # An index has blocks beside those of the layers that it serves.
    index = [layer for layer in geometry.cache if layer.kind == "index"]
    beside = sum(_page_bytes(layer, parallel.tensor, value_bytes, block_tokens) for layer in index)
    return Pool(group * (page + beside), tuple(groups))


def _group_size(counts: list[int]) -> int:
    """Layers of a group: the smallest number of one kind, or the largest where that is less than half more."""
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)


def _blocks(layer: CacheLayers, tokens: int, in_flight: int, block_tokens: int) -> int:
    if layer.kind == "state":
        return 1
    if layer.window is None:
        return math.ceil(tokens / block_tokens)
    if layer.kind == "chunked":
        return math.ceil(min(layer.window + in_flight, tokens) / block_tokens)
    # A window does not begin where a block does.
    return math.ceil(min(layer.window - 1 + in_flight, tokens) / block_tokens) + 1


def _page_bytes(layer: CacheLayers, tensor: int, value_bytes: int, block_tokens: int) -> int:
    """Bytes of a block of one layer on one card; of a state, all of it."""
    each = layer.fixed_bytes or value_bytes
    if layer.kind == "state":
        return math.ceil(layer.values * each / tensor)
    return math.ceil(max(1, layer.heads // tensor) * layer.values * each * block_tokens)


# --- what to do where it does not fit


def next_steps(
    inventory: Inventory, gpu: Gpu, gpus: int, demand: Demand | None = None, *, found: Capacity | None = None
) -> list[str]:
    """Sentences on what would make one sequence of full length fit, the least first; empty where it does."""
    demand = demand or Demand()
    found = found or capacity(inventory, gpu, spread(inventory, gpus), demand)
    if found.fits:
        return []
    steps = []
    if found.max_context:
        steps.append(f"a shorter context: --max-model-len {found.max_context} leaves room for one sequence")
    if demand.kv_dtype in ("auto", "bfloat16", "float16"):
        smaller = capacity(inventory, gpu, found.parallel, replace(demand, kv_dtype="fp8"))
        if smaller.fits:
            steps.append(f"a cache in FP8: --kv-cache-dtype fp8 holds {_sequences(smaller)}")
    more = _smallest_count(inventory, gpu, gpus, demand)
    if more is not None:
        steps.append(f"more cards: --count {more.parallel.gpus} holds {_sequences(more)}")
    fewer = _largest_experts(inventory, gpu, found.parallel, demand)
    if fewer is None:
        steps.append(
            f"fewer experts alone do not do it: it does not fit with {MOST_REMOVED:.0%} of them removed either"
        )
    else:
        removed = (inventory.num_experts - fewer.num_experts) / inventory.num_experts
        steps.append(
            f"fewer experts: {fewer.num_experts} of {inventory.num_experts}, {100 * removed:.1f} % removed, hold {_sequences(fewer)}"
        )
    return steps


def _sequences(found: Capacity) -> str:
    return f"{found.max_num_seqs} sequence{'s' if found.max_num_seqs > 1 else ''} of {found.context:,} tokens"


def _smallest_count(inventory: Inventory, gpu: Gpu, gpus: int, demand: Demand) -> Capacity | None:
    """The next larger power of two of cards on which it fits, up to 64."""
    count = 1 << gpus.bit_length()
    while count <= 64:
        found = capacity(inventory, gpu, spread(inventory, count), demand)
        if found.fits:
            return found
        count *= 2
    return None


def _largest_experts(inventory: Inventory, gpu: Gpu, parallel: Parallel, demand: Demand) -> Capacity | None:
    """With as many experts as fit, in steps that divide among cards and router groups."""
    step = math.lcm(inventory.num_groups, parallel.tensor)
    least = max(inventory.top_k, step, math.ceil(inventory.num_experts * (1 - MOST_REMOVED)))
    for kept in range((inventory.num_experts - 1) // step * step, least - 1, -step):
        found = capacity(inventory, gpu, parallel, demand, num_experts=kept)
        if found.fits:
            return found
    return None
