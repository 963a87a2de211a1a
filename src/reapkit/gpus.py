"""Graphics cards and other accelerators by name: data only.

Memory is what a driver leaves to programs, which is less than the number in the name: the total that torch reports in its messages, the
smallest that was seen of each card, rounded down. Err low: a plan that leaves memory over starts, one that lacks it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reapkit.errors import UsageError, did_you_mean

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: for `--gpu`.
        title: for people.
        nbytes: of memory that programs may take.
        utilization: share of it that an engine is to take by default.
        max_batched_tokens, max_num_seqs: vLLM's defaults for a server on such a card (`get_batch_defaults` of its `engine/arg_utils.py`).
        words: as they stand in the driver's name of the card, all of them.
        unified: whether the memory is the machine's own, which the system needs too.
    """

    name: str
    title: str
    nbytes: int
    words: tuple[str, ...]
    utilization: float = 0.92
    max_batched_tokens: int = 2048
    max_num_seqs: int = 256
    unified: bool = False


def _gib(count: float) -> int:
    return int(count * GIB)


# vLLM takes 0.92 of the total unless told otherwise (`config/cache.py` of 0.32).
GPUS: tuple[Gpu, ...] = (
    # "total capacity of 79.14 GiB" to 79.25; nvidia-smi says 81,559 MiB.
    Gpu("h100", "NVIDIA H100 80 GB", _gib(79.1), ("h100",), max_batched_tokens=8192, max_num_seqs=1024),
    # "139.80 GiB"; nvidia-smi 143,771 MiB.
    Gpu("h200", "NVIDIA H200 141 GB", _gib(139.8), ("h200",), max_batched_tokens=8192, max_num_seqs=1024),
    # "178.35 GB" of torch's device properties, which are GiB.
    Gpu("b200", "NVIDIA B200 180 GB", _gib(178.3), ("b200",), max_batched_tokens=16384, max_num_seqs=1024),
    # "79.14 GiB"; nvidia-smi 81,920 MiB.
    Gpu("a100-80", "NVIDIA A100 80 GB", _gib(79.1), ("a100", "80gb")),
    # "39.38 GiB"; nvidia-smi 40,960 MiB.
    Gpu("a100-40", "NVIDIA A100 40 GB", _gib(39.3), ("a100", "40gb")),
    # "44.34 GiB" with ECC; nvidia-smi 46,068 MiB.
    Gpu("l40s", "NVIDIA L40S 48 GB", _gib(44.3), ("l40s",)),
    # "94.96 GiB"; nvidia-smi 97,887 MiB.
    Gpu("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell 96 GB", _gib(94.9), ("rtx", "pro", "6000"),
        max_batched_tokens=8192, max_num_seqs=1024),
    # "31.34 GiB"; nvidia-smi 32,607 MiB.
    Gpu("rtx-5090", "NVIDIA RTX 5090 32 GB", _gib(31.3), ("5090",)),
    # "23.52 GiB"; nvidia-smi 24,564 MiB.
    Gpu("rtx-4090", "NVIDIA RTX 4090 24 GB", _gib(23.5), ("4090",)),
    # "23.56 GiB"; nvidia-smi 24,576 MiB.
    Gpu("rtx-3090", "NVIDIA RTX 3090 24 GB", _gib(23.5), ("3090",)),
    # "191.69 GiB" to 191.98.
    Gpu("mi300x", "AMD Instinct MI300X 192 GB", _gib(191.6), ("mi300x",), max_batched_tokens=16384, max_num_seqs=1024),
    # A GB10 (DGX Spark) shows 121.6 GiB, of which owners found 101 to 102 free for vLLM on a machine just started, whatever they
    # stopped: 0.83. Strix Halo and Apple's machines of 128 GB let programs take about as much (96 GB by default, more by a setting).
    Gpu("unified-128", "unified memory of 128 GB (GB10, Strix Halo, Apple)", _gib(121.6), ("gb10",), utilization=0.83,
        max_batched_tokens=8192, max_num_seqs=1024, unified=True),
)  # fmt: skip


def find(name: str) -> Gpu:
    """The card of a name.

    Raises:
        UsageError: there is none, with the closest named.
    """
    by_name = {gpu.name: gpu for gpu in GPUS}
    if name.lower() not in by_name:
        raise UsageError(
            f"there is no card {name!r}", hint=f"{did_you_mean(name.lower(), by_name)}; see reapkit list gpus"
        )
    return by_name[name.lower()]


def recognize(title: str, nbytes: int) -> Gpu:
    """The card that a driver names, with the memory that it was found to have; one that is not listed gets vLLM's plain defaults."""
    text = title.lower()
    for gpu in GPUS:
        if all(word in text for word in gpu.words):
            return Gpu(
                gpu.name,
                title,
                nbytes,
                gpu.words,
                gpu.utilization,
                gpu.max_batched_tokens,
                gpu.max_num_seqs,
                gpu.unified,
            )
    large = nbytes >= 70 * GIB
    return Gpu(
        text.replace(" ", "-"),
        title,
        nbytes,
        (),
        max_batched_tokens=8192 if large else 2048,
        max_num_seqs=1024 if large else 256,
    )


def described(gpu: Gpu) -> dict[str, Any]:
    """A row of `reapkit list gpus`."""
    return {
        "gpu": gpu.name,
        "card": gpu.title,
        "memory": f"{gpu.nbytes / GIB:.1f} GiB",
        "used by default": f"{gpu.utilization:.0%}",
    }
