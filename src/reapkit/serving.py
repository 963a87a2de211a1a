"""Which command serves a checkpoint, why each of its flags is there, and what could go wrong before hours are spent on it.

vLLM is the first choice; SGLang and transformers' own server are second ones, where they take the model.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reapkit import capacity as capacities
from reapkit import gpus as cards
from reapkit import inventory as inventories
from reapkit.architectures import ARCHITECTURES
from reapkit.capacity import Capacity, Demand, Parallel, spread
from reapkit.dialects import BALANCES_EXPERTS, SGLANG_REASONING, SGLANG_TOOLS
from reapkit.errors import UnsupportedError, UsageError, did_you_mean
from reapkit.gpus import Gpu
from reapkit.inventory import Inventory
from reapkit.progress import Progress, silent

ENGINES = ("vllm", "sglang", "transformers")

# A sequence shorter than this is a greeting. Where the cache cannot give as many tokens to each of an engine's default number of
# sequences, running sequences would be put off and computed again: then a smaller number is said.
SHORT_CHAT_TOKENS = 1024
# vLLM's Triton kernels pad the experts of a card to a multiple of this and sort below it (`moe_align_block_size`).
MAX_LOCAL_EXPERTS = 1024
# TensorRT-LLM's FP8 kernels, which vLLM prefers on Blackwell, assert this of the number of all experts.
TRTLLM_MULTIPLE = 4
# Expert counts and widths per card of block-FP8 models for which vLLM 0.32 ships tuned Triton tiles, with some of the cards.
TUNED = {
    (256, 384): ("NVIDIA_H100_80GB_HBM3", "RTX PRO 6000"),
    (64, 1536): ("RTX PRO 6000",),
    (128, 384): ("H20", "H200", "B200", "GB200", "MI300X"),
}


@dataclass(frozen=True)
class Flag:
    """Some words of a command.

    Attributes:
        words: the flag and its value.
        reason: why it is there, as a clause.
    """

    words: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Deployment:
    """How a checkpoint is to be served.

    Attributes:
        model: as the user named it.
        engine: one of `ENGINES`.
        parallel: how it is spread over cards.
        program: the first words of the command, before the model's name.
        flags: the others, in order.
        capacity: what a card holds; None where no card was named.
        warnings: sentences on what can go wrong.
        next_steps: sentences on what would make it fit, where it does not.
    """

    model: str
    engine: str
    parallel: Parallel
    program: tuple[str, ...]
    flags: tuple[Flag, ...]
    capacity: Capacity | None
    warnings: tuple[str, ...]
    next_steps: tuple[str, ...]

    @property
    def command(self) -> tuple[str, ...]:
        return (*self.program, *(word for flag in self.flags for word in flag.words))

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "engine": self.engine,
            "command": list(self.command),
            "shell": shlex.join(self.command),
            "flags": [{"words": list(flag.words), "reason": flag.reason} for flag in self.flags],
            "capacity": None if self.capacity is None else self.capacity.to_json(),
            "warnings": list(self.warnings),
            "next_steps": list(self.next_steps),
        }


def command(
    inventory: Inventory,
    *,
    model: str | None = None,
    engine: str = "vllm",
    gpus: int = 1,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """The words of the command that serves a checkpoint: for model cards, which know neither the reader's cards nor their memory.

    For MiniMax-M2-REAP-162B on eight cards with `trust_remote_code` these are the words of its vendor's card.

    Args:
        inventory: of the checkpoint, from `inspect`.
        model: the name to serve it by, such as a hub id; how the inventory's checkpoint was named by default.
        engine: one of `ENGINES`.
        gpus: cards.
        trust_remote_code: whether the user agreed to run the checkpoint's own code; the flag is there only where there is such code, too.

    Raises:
        UsageError: an unknown engine, no cards.
        UnsupportedError: the engine does not take the model, or not on so many cards.
    """
    return deployment(inventory, model=model, engine=engine, gpus=gpus, trust_remote_code=trust_remote_code).command


def deployment(
    inventory: Inventory,
    *,
    model: str | None = None,
    engine: str = "vllm",
    gpu: Gpu | None = None,
    gpus: int = 1,
    trust_remote_code: bool = False,
    demand: Demand | None = None,
    max_num_seqs: int | None = None,
    extra: Sequence[str] = (),
) -> Deployment:
    """How a checkpoint is to be served on some cards.

    Args:
        inventory, model, engine, gpus, trust_remote_code: as for `command`.
        gpu: the card, for the arithmetic of memory; None leaves it out.
        demand: context, dtype of the cache and share of the card, where others than the defaults are wanted.
        max_num_seqs: sequences at once, where fewer or more than the engine's default are wanted.
        extra: words for the end of the command.

    Raises:
        As `command`.
    """
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}", hint=did_you_mean(engine, ENGINES))
    if max_num_seqs is not None and max_num_seqs < 1:
        raise UsageError(f"--max-num-seqs {max_num_seqs} is no number of sequences", hint="--max-num-seqs 1 or more")
    demand = demand or Demand()
    parallel = spread(inventory, gpus)
    name = model or inventory.origin
    found = None if gpu is None else capacities.capacity(inventory, gpu, parallel, demand)
    make = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers}[engine]
    program, flags = make(inventory, name, parallel, trust_remote_code)
    flags = [*flags, *_limits(engine, inventory, demand, found, max_num_seqs)]
    if extra:
        flags.append(Flag(tuple(extra), _GIVEN_LAST))
    steps = [] if gpu is None or found is None else capacities.next_steps(inventory, gpu, gpus, demand, found=found)
    if (
        any("--max-model-len" in flag.words or "--context-length" in flag.words for flag in flags)
        and found
        and not found.fits
    ):
        steps = [step for step in steps if not step.startswith("a shorter context")]
    warnings = [*_code_warnings(inventory, trust_remote_code)]
    if engine == "vllm":
        warnings += shape_warnings(inventory, parallel)
    return Deployment(name, engine, parallel, program, tuple(flags), found, tuple(warnings), tuple(steps))


def serve(
    source: str | Path,
    *,
    engine: str = "vllm",
    gpu: str | None = None,
    count: int | None = None,
    trust_remote_code: bool = False,
    demand: Demand | None = None,
    max_num_seqs: int | None = None,
    extra: Sequence[str] = (),
    revision: str | None = None,
    progress: Progress = silent,
) -> Deployment:
    """How a checkpoint is to be served: the command, what a card holds, what can go wrong. Nothing is started.

    Args:
        source: a folder or hub id, whose shards need not be there.
        gpu: the name of a card; None takes those of this machine, and without any leaves out the arithmetic of memory.
        count: cards; None takes one of a named card, and all of this machine's.
        engine, trust_remote_code, demand, max_num_seqs, extra: as for `deployment`.
        revision: of a hub id.
        progress: told how headers come from the hub.

    Raises:
        As `inspect` and `deployment`; UsageError: an unknown card.
    """
    card, number = (cards.find(gpu), count) if gpu is not None else capacities.found(count)
    inventory = inventories.inspect(source, revision=revision, ratios=(), progress=progress)
    return deployment(
        inventory,
        model=str(source),
        engine=engine,
        gpu=card,
        gpus=1 if number is None else number,
        trust_remote_code=trust_remote_code,
        demand=demand,
        max_num_seqs=max_num_seqs,
        extra=extra,
    )


# --- the engines' words


def _vllm(inventory: Inventory, model: str, parallel: Parallel, trusted: bool) -> tuple[tuple[str, ...], list[Flag]]:
    flags = []
    if parallel.tensor > 1:
        flags.append(
            Flag(("--tensor-parallel-size", str(parallel.tensor)), f"{parallel.tensor} cards share every layer")
        )
    if parallel.pipeline > 1:
        reason = (
            f"{_heads(inventory)} do not divide by {parallel.gpus}, so that {parallel.pipeline} stages share the layers"
        )
        flags.append(Flag(("--pipeline-parallel-size", str(parallel.pipeline)), reason))
    if inventory.tool_parser:
        flags.append(
            Flag(("--tool-call-parser", inventory.tool_parser), f"how {inventory.architecture} writes tool calls")
        )
    if inventory.reasoning_parser:
        flags.append(
            Flag(("--reasoning-parser", inventory.reasoning_parser), f"how {inventory.architecture} writes reasoning")
        )
    if trusted and _own_code(inventory):
        flags.append(
            Flag(("--trust-remote-code",), "config.json names code of the checkpoint's own, and you agreed to run it")
        )
    if parallel.experts:
        # Spelt as in the vendor's card; vLLM reads both spellings.
        flags.append(Flag(("--enable_expert_parallel",), _why_whole_experts(inventory, parallel)))
    if inventory.tool_parser:
        flags.append(Flag(("--enable-auto-tool-choice",), "lets the model decide whether to call a tool"))
    return ("vllm", "serve", model), flags


def _sglang(inventory: Inventory, model: str, parallel: Parallel, trusted: bool) -> tuple[tuple[str, ...], list[Flag]]:
    flags = []
    if parallel.tensor > 1:
        flags.append(Flag(("--tp-size", str(parallel.tensor)), f"{parallel.tensor} cards share every layer"))
    if parallel.pipeline > 1:
        flags.append(Flag(("--pp-size", str(parallel.pipeline)), f"{parallel.pipeline} stages share the layers"))
    if tools := SGLANG_TOOLS.get(inventory.tool_parser or ""):
        flags.append(Flag(("--tool-call-parser", tools), f"how {inventory.architecture} writes tool calls"))
    if reasoning := SGLANG_REASONING.get(inventory.reasoning_parser or ""):
        flags.append(Flag(("--reasoning-parser", reasoning), f"how {inventory.architecture} writes reasoning"))
    if trusted and _own_code(inventory):
        flags.append(
            Flag(("--trust-remote-code",), "config.json names code of the checkpoint's own, and you agreed to run it")
        )
    if parallel.experts:
        if inventory.num_experts % parallel.tensor:
            raise UnsupportedError(
                f"SGLang shares whole experts equally, and {inventory.num_experts} do not divide by {parallel.tensor}",
                hint=f"use vLLM, or plan again with --divisible-by {parallel.tensor}",
            )
        flags.append(Flag(("--ep-size", str(parallel.tensor)), _why_whole_experts(inventory, parallel)))
    return ("python", "-m", "sglang.launch_server", "--model-path", model), flags


def _transformers(
    inventory: Inventory, model: str, parallel: Parallel, trusted: bool
) -> tuple[tuple[str, ...], list[Flag]]:
    entry = next(entry for entry in ARCHITECTURES if inventory.model_type in entry.model_types)
    if inventory.model_type in entry.not_in_transformers:
        raise UnsupportedError(f"transformers has no class for {inventory.model_type!r}", hint="use --engine vllm")
    flags = []
    if trusted and _own_code(inventory):
        flags.append(
            Flag(("--trust-remote-code",), "config.json names code of the checkpoint's own, and you agreed to run it")
        )
    return ("transformers", "serve", model), flags


_GIVEN_LAST = "as given behind --"
_LENGTH = {"vllm": "--max-model-len", "sglang": "--context-length"}
_SEQUENCES = {"vllm": "--max-num-seqs", "sglang": "--max-running-requests"}
_UTILIZATION = {"vllm": "--gpu-memory-utilization", "sglang": "--mem-fraction-static"}
_SGLANG_FP8 = "fp8_e4m3"


def _limits(
    engine: str, inventory: Inventory, demand: Demand, found: Capacity | None, max_num_seqs: int | None
) -> list[Flag]:
    """Flags on length, number of sequences, cache and memory: those that were asked for, and those without which it does not start."""
    if engine == "transformers":
        return []
    flags = []
    length = demand.context
    if length is not None:
        flags.append(Flag((_LENGTH[engine], str(length)), "as given"))
    elif found is not None and not found.fits and found.max_context:
        length = found.max_context
        reason = f"the cache holds no sequence of {found.context:,} tokens, {_gb(found.missing)} a card are missing"
        flags.append(Flag((_LENGTH[engine], str(length)), reason))
    if max_num_seqs is not None:
        flags.append(Flag((_SEQUENCES[engine], str(max_num_seqs)), "as given"))
    elif found is not None and found.max_context:
        room = max(0, found.cache) // max(1, found.per_token or found.per_sequence) // SHORT_CHAT_TOKENS
        if room < found.gpu.max_num_seqs:
            reason = f"the cache holds so many sequences of {SHORT_CHAT_TOKENS:,} tokens, and more would be put off and computed again"
            flags.append(Flag((_SEQUENCES[engine], str(max(1, room))), reason))
    if demand.kv_dtype != "auto":
        word = _SGLANG_FP8 if engine == "sglang" and demand.kv_dtype == "fp8" else demand.kv_dtype
        flags.append(Flag(("--kv-cache-dtype", word), "as given"))
    if demand.utilization is not None:
        flags.append(Flag((_UTILIZATION[engine], str(demand.utilization)), "as given"))
    elif found is not None and found.gpu.unified:
        reason = "the system needs the rest of a memory that it shares"
        flags.append(Flag((_UTILIZATION[engine], str(found.gpu.utilization)), reason))
    return flags


def _own_code(inventory: Inventory) -> bool:
    return inventory.geometry is not None and inventory.geometry.needs_own_code


def _code_warnings(inventory: Inventory, trusted: bool) -> list[str]:
    if _own_code(inventory) and not trusted:
        return [
            "config.json names code of the checkpoint's own (auto_map): engines that know the family do not need it, and others ask for "
            "it; read that code before you give --trust-remote-code"
        ]
    if trusted and not _own_code(inventory):
        return ["--trust-remote-code was left out: config.json names no code of the checkpoint's own"]
    return []


def _heads(inventory: Inventory) -> str:
    geometry = inventory.geometry
    return (
        "attention heads"
        if geometry is None
        else f"{geometry.num_heads} query and {geometry.num_kv_heads} key-value heads"
    )


def _why_whole_experts(inventory: Inventory, parallel: Parallel) -> str:
    width = inventory.geometry.expert_size if inventory.geometry else 0
    block = f" into blocks of {inventory.block[0]} that share a scale" if inventory.block else ""
    return f"experts are {width:,} wide, which {parallel.tensor} cards cannot cut{block}: each card has whole experts instead"


# --- checks of shapes


def split_of_experts(num_experts: int, cards: int) -> tuple[int, ...]:
    """Experts on each card: the first ones have one more where they do not divide (vLLM's linear placement)."""
    least, more = divmod(num_experts, cards)
    return tuple(least + (card < more) for card in range(cards))


def safe_neighbours(num_experts: int, cards: int, *, original: int | None = None) -> tuple[int, ...]:
    """Numbers of experts close by that divide among cards, the next below and the two above."""
    below = num_experts // cards * cards
    near = (below, below + cards, below + 2 * cards)
    return tuple(count for count in near if count > 0 and (original is None or count <= original))


def shape_warnings(inventory: Inventory, parallel: Parallel) -> list[str]:
    """Sentences on what vLLM 0.32 does with this number of experts on so many cards."""
    experts, cards = inventory.num_experts, parallel.tensor
    warnings = []
    if parallel.experts and experts < cards:
        warnings.append(f"vLLM refuses {experts} experts on {cards} cards: there must be one for each")
    elif parallel.experts and experts % cards:
        split = split_of_experts(experts, cards)
        safe = ", ".join(map(str, safe_neighbours(experts, cards)))
        warnings.append(
            f"{experts} experts do not divide by {cards}: cards get {', '.join(map(str, split))}. vLLM starts, and kernels that compute an "
            "expert's number from its card's (FlashInfer's CUTLASS, the first choice for block FP8 on Hopper, TensorRT-LLM's and most of "
            "CUTLASS) then give wrong results without a word. Add --moe-backend triton (or deep_gemm, or marlin), which go by a map"
            + ("" if not capacities.expert_slices_fit(inventory, cards) else ", or leave out expert parallelism")
            + f"; or keep a number that divides: {safe}, by reapkit plan … --divisible-by {cards}"
        )
    if experts % TRTLLM_MULTIPLE:
        warnings.append(
            f"{experts} experts do not divide by {TRTLLM_MULTIPLE}: TensorRT-LLM's FP8 kernels, the first choice on Blackwell, stop with "
            "an AssertionError; --moe-backend triton avoids them"
        )
    local = math.ceil(experts / cards) if parallel.experts else experts
    if local >= MAX_LOCAL_EXPERTS:
        warnings.append(f"{local} experts on a card are more than vLLM's Triton kernels sort ({MAX_LOCAL_EXPERTS - 1})")
    if inventory.num_groups > 1 and experts % inventory.num_groups:
        warnings.append(
            f"{experts} experts do not divide into the router's {inventory.num_groups} groups: vLLM falls back to plain top-k without a "
            "word, and transformers stops with an error"
        )
    if parallel.experts:
        if inventory.model_type not in BALANCES_EXPERTS:
            warnings.append(
                f"--enable-eplb (experts held twice where many tokens need them) is not for {inventory.architecture} in vLLM"
            )
        elif experts % cards:
            spare = -experts % cards
            warnings.append(
                f"--enable-eplb asks that experts and spare copies divide by {cards}: num_redundant_experts {spare} at least"
            )
    warnings += _tuning(inventory, parallel)
    return warnings


def _tuning(inventory: Inventory, parallel: Parallel) -> list[str]:
    """Whether vLLM ships tiles for its Triton kernels that were tuned for as many experts of this width on a card."""
    geometry = inventory.geometry
    if geometry is None:
        return []
    local = math.ceil(inventory.num_experts / parallel.tensor) if parallel.experts else inventory.num_experts
    width = geometry.expert_size if parallel.experts else geometry.expert_size // parallel.tensor
    fp8 = inventory.block is not None
    tuned = TUNED.get((local, width), ()) if fp8 else ()
    dtype = ",dtype=fp8_w8a8,block_shape=[128,128]" if fp8 else ""
    known = f" (it ships it for {', '.join(tuned)})" if tuned else ""
    flags = f"-tp {parallel.tensor}{' --enable-expert-parallel' if parallel.experts else ''}{' --dtype fp8_w8a8' if fp8 else ''}"
    return [
        f"where vLLM's log says 'Using default MoE config', the Triton kernels have no tiles tuned for E={local},N={width}{dtype} on your "
        f"card{known}: results are right, the kernels slower. With vLLM's repository and a free card, `python "
        f"benchmarks/kernels/benchmark_moe.py --model {inventory.origin} {flags} --tune --save-dir DIR` makes the file, and "
        "VLLM_TUNED_CONFIG_FOLDER=DIR has it used"
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def listening_on(found: Deployment, host: str, port: int, *, by_default: bool = False) -> Deployment:
    """The same with where it is to listen, which engines otherwise choose themselves, vLLM every address of the machine."""
    reason = "this machine alone: engines ask nobody who they are" if by_default else "as given"
    flags = list(found.flags)
    at = next((i for i, flag in enumerate(flags) if flag.reason == _GIVEN_LAST), len(flags))
    flags.insert(at, Flag(("--host", host, "--port", str(port)), reason))
    return replace(found, flags=tuple(flags))


def with_program(found: Deployment, program: Sequence[str]) -> Deployment:
    """The same, run by another executable: the words before the model's name replaced but for the verb."""
    verb = {"vllm": ("serve", found.model), "sglang": ("-m", "sglang.launch_server", "--model-path", found.model)}
    words = verb.get(found.engine, ("serve", found.model))
    return replace(found, program=(*program, *words))
