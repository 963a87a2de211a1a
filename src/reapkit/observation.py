"""Observing: the model's own forward over the calibration text, layer by layer, summed into statistics.

Weights are read once per wave, a wave being as many micro-batches as the activation budget holds. Every micro-batch adds to running
totals, so the number of waves does not change what is measured.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from reapkit import layout as layouts
from reapkit import plans
from reapkit.activations import PLACES, RESIDENT, Place
from reapkit.architectures import ARCHITECTURES
from reapkit.calibration import CalibrationBatch, CalibrationData, batches, load
from reapkit.checkpoint import Checkpoint
from reapkit.errors import CheckpointError, DataError, ResourceError, UnsupportedError, UsageError, did_you_mean
from reapkit.evidence import agreement_of_halves
from reapkit.experts import experts_of
from reapkit.interrupts import deferred, safe_point
from reapkit.layout import Identity, tokens_ahead
from reapkit.memory import free_memory, total_memory
from reapkit.modules import StreamedModel, SuspendedForwards, load_processor, load_tokenizer
from reapkit.outputs import alone, discard, lock_of, unfinished
from reapkit.progress import Progress, silent
from reapkit.ranks import Ranks
from reapkit.rerouting import Reroute, RerouteRecorder
from reapkit.samples import RoutedSamples, SampleHeader, SampleWriter, beside, require_space
from reapkit.sources import NUM_CONNECTIONS, Disk, Remote
from reapkit.statistics import NUM_FOLDS, CalibrationRecord, LayerStatistics, Statistics, differing
from reapkit.sums import RoutedSums

ACTIVATIONS = "suspended activations"
FP8 = "float8"
# In FP8 the products of experts are computed, all else in bfloat16.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, FP8: torch.bfloat16}
# Tokens that run through a layer at once. More fills a GPU better and costs memory for the routed pairs of one layer: 32,768 tokens of
# MiniMax-M2 take 6 GB in bf16. Where two layers and that do not fit on a GPU, as many halves of it as do.
TOKENS_PER_BATCH = {"cuda": 32_768, "cpu": 4_096}
FEWEST_TOKENS = 2_048
# What a GPU's libraries take for themselves, and what lies unused between allocations.
WORKSPACES = {"cuda": 1 << 30, "cpu": 0}
# Share of a device's memory that two layers and a running micro-batch may take, so that something is left for what is suspended.
WORKING_SHARE = 0.9
# Per token a suspended forward holds its hidden state and the embeddings that the model's own forward keeps alive.
HELD_STATES = 2
# What a document with images holds beside its pixels, as a multiple of that. Per image token Qwen3-VL keeps what its vision tower made
# for the embeddings and for three layers, all of it twice, and the tower's last states of four patches: measured, 6 times.
IMAGES_FACTOR = 7
# Micro-batches that may be suspended at once: each keeps its frames, and its positions' cosines and sines, besides its hidden states.
MAX_SUSPENDED = 2048
# Share of a matrix product's rate that a whole layer reaches: gathering, attention and small groups cost the rest. m2-nano on two CPU
# cores reaches about a quarter, a MiniMax-M2 layer on an H100 more than half, and three quarters of bfloat16's with experts in FP8. Erring
# low makes the estimate of the time too long, and more waves than needed.
LAYER_EFFICIENCY = {"cuda": 0.55, "cpu": 0.3}
# Of the largest shard, to measure how fast a disk reads.
_MEASURED_BYTES = 256 << 20
# How long a wave should take at most, since it is lost when the process dies; and how many times as long as reading the weights at
# least, so that reading stays hidden behind computing.
WAVE_SECONDS = 120.0
WAVE_READS = 2.0
# No machine that runs such models is slower: below a wave's length at this rate, rates need not be measured.
SLOWEST_FLOPS = 1e10
# Waves at least where observing may stop when the choice has settled: it stops at the end of one, and each reads the weights once.
SETTLING_WAVES = 8
# Share of the free memory that activations may take when no budget is given. On a GPU it is of what two layers and a micro-batch leave,
# short of what fragments; a host's memory is also for the page cache and for others.
BUDGET_SHARE = {"cuda": 0.8, "cpu": 0.4}


@dataclass(frozen=True)
class Run:
    """Where and how a model is run.

    Attributes:
        device: `cuda`, `cuda:1`, `cpu`; None takes a GPU where there is one.
        dtype: `float32`, `bfloat16`, `float16`, or `float8`: experts in FP8 as they are stored, with their inputs rounded to it, and all
            else in bfloat16. None takes bfloat16 on a GPU and float32 on a CPU.
        activation_budget: bytes for suspended activations; None takes a share of the free memory.
        trust_remote_code: run code that comes with the checkpoint.
        place: where suspended activations are kept: `device`, `host` (pinned memory), `disk`; None takes the device, or the host where
            the device holds so few that reading the weights over and over would take longer than computing.
        plain: take the reference path on a GPU too, without fused kernels.
        disk_budget: bytes on disk for layers that come through the network; None takes what their number of readings makes useful.
    """

    device: str | None = None
    dtype: str | None = None
    activation_budget: int | None = None
    trust_remote_code: bool = False
    place: str | None = None
    plain: bool = False
    disk_budget: int | None = None

    @property
    def fp8(self) -> bool:
        """Whether experts' products are computed in FP8."""
        return self.dtype == FP8

    def resolve(self, *, observing: bool = False) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype; of `float8`, in which only observing computes, that of all else.

        Raises:
            UsageError: no such device or dtype.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UsageError(f"there is no device {name!r}", hint="cpu, cuda or cuda:1") from None
        if device.type not in TOKENS_PER_BATCH:
            raise UsageError(f"the device {name!r} is not supported", hint="cpu, cuda or cuda:1")
        if device.type == "cuda":
            # Threads choose their device by its number; of the processes on a host each has its own.
            index = Ranks.from_environment().local_rank if device.index is None else device.index
            if index >= torch.cuda.device_count():
                raise UsageError(
                    f"there is no device {f'cuda:{index}'!r}: torch sees {torch.cuda.device_count()} GPUs",
                    hint="--device cpu, or fewer processes",
                )
            device = torch.device("cuda", index)
        dtype = self.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        if dtype not in DTYPES:
            raise UsageError(f"cannot compute in {dtype!r}", hint=did_you_mean(dtype, DTYPES))
        if self.fp8 and not observing:
            raise UsageError(f"only observing computes in {FP8}", hint="--dtype bfloat16")
        if self.place is not None and self.place not in PLACES:
            raise UsageError(f"activations cannot be kept on {self.place!r}", hint=did_you_mean(self.place, PLACES))
        if self.place == "host" and device.type == "cpu":
            raise UsageError("on a CPU suspended activations are in the host's memory already", hint="device or disk")
        return device, DTYPES[dtype]


@dataclass(frozen=True)
class Settled:
    """When enough text has been observed: the sets that its halves would keep agree this far.

    Attributes:
        agreement: Jaccard index, of the criterion `reap`.
        ratio: share of the experts to remove, read as a decimal; or
        keep: number of experts to keep per layer.
    """

    agreement: float
    ratio: str | float | None = None
    keep: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What an observation would take, before it starts.

    Attributes:
        tokens: calibration tokens, padding not counted; documents, batches, waves: how they are cut.
        hours: wall time at the rates measured on this machine in a second or two; an estimate.
        device_bytes: peak memory on the device, on a CPU besides the process itself.
        held_bytes: suspended activations, which are kept at `place`: on the device, where they are part of its bytes, the host or disk.
        read_bytes: bytes read from disk over all waves; output_bytes: size of the statistics file; reroute_bytes: of the sample beside it.
        moved_bytes: of what is read, bytes that come through the network.
        compute_rate: tokens per second and layer; disk_rate: bytes per second.
        device, dtype: where and in what is computed.
    """

    tokens: int
    documents: int
    batches: int
    waves: int
    hours: float
    device_bytes: int
    held_bytes: int
    place: Place
    read_bytes: int
    moved_bytes: int
    output_bytes: int
    reroute_bytes: int
    compute_rate: float
    disk_rate: float
    device: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Observation:
    """A model, its calibration text and the waves in which it will be observed.

    Args:
        source: a checkpoint, its folder or hub id.
        data: `--data` arguments.
        run: device, dtype and memory.
        max_length: tokens per document; longer samples are split into windows.
        seed: of the choice of samples, and of sampled tokens.
        revision: of a hub id.
        ranks: which share of the micro-batches is observed here.
        reroute: what to gather for re-routed errors; None gathers nothing.
        until: when to stop before the end of the text; None observes all of it.
        progress: told how headers and fingerprints come from the hub.

    Raises:
        UnsupportedError: among others, re-routed errors are not defined for this family.
    """

    def __init__(
        self,
        source: Checkpoint | str | Path,
        data: Sequence[str],
        *,
        run: Run,
        max_length: int,
        seed: int,
        revision: str | None = None,
        ranks: Ranks | None = None,
        reroute: Reroute | None = None,
        until: Settled | None = None,
        progress: Progress = silent,
    ) -> None:
        device, dtype = run.resolve(observing=True)
        self.ranks = Ranks() if ranks is None else ranks
        self.checkpoint = (
            source if isinstance(source, Checkpoint) else Checkpoint.open(source, revision=revision, progress=progress)
        )
        self.layout = layouts.resolve(self.checkpoint, ARCHITECTURES)
        tokenizer = load_tokenizer(self.checkpoint, trust_remote_code=run.trust_remote_code)
        processor = partial(load_processor, self.checkpoint, trust_remote_code=run.trust_remote_code)
        self.data: CalibrationData = load(data, tokenizer, max_length=max_length, seed=seed, processor=processor)
        self.model = StreamedModel(
            self.checkpoint,
            self.layout,
            device=device,
            dtype=dtype,
            trust_remote_code=run.trust_remote_code,
            plain=run.plain,
            fp8=run.fp8,
        )
        require_embeddings(self.data, self.model)
        self.seed = seed
        self.source = Identity.of(self.checkpoint, self.layout)
        self.settings: dict[str, Any] = {
            "dtype": FP8 if run.fp8 else str(dtype).removeprefix("torch."),
            "max_length": max_length,
            "tokenizer": _tokenizer_fingerprint(tokenizer),
        }
        everything = batches(self.data, tokens_per_batch=tokens_per_batch(self.model))
        self.batches = self.ranks.share(everything)
        if not self.batches:
            raise UsageError(
                f"the text is too short for {self.ranks.count} processes: it has fewer micro-batches",
                hint="start fewer, or observe more text",
            )
        self.recorder = None if reroute is None else RerouteRecorder(self.model, everything, reroute, seed=seed)
        self.place, self.budget = self._choose_place(run)
        self._disk_budget = run.disk_budget
        self.until = until
        self._keep = 0 if until is None else self._require_settling(until)
        self.waves = self._split(self.batches)

    def _require_settling(self, until: Settled) -> int:
        """The number of experts that would stay, where observing may stop early at all."""
        if not 0 < until.agreement <= 1:
            raise UsageError(f"--until-stable {until.agreement} is not a share of experts", hint="for example 0.98")
        if self.ranks.count > 1:
            raise UsageError(
                "--until-stable looks at the sums of all text, which no single process has", hint="leave it out"
            )
        if self.recorder is not None:
            raise UsageError("--until-stable and --reroute-tokens do not go together: tokens are sampled from all of the text",
                             hint="see first how much text it takes, then sample")  # fmt: skip
        return plans.require_target(self.layout, criterion="reap", ratio=until.ratio, keep=until.keep)

    @cached_property
    def compute_rate(self) -> float:
        """Tokens per second and layer, from matrix products measured for a third of a second."""
        return _measure_flops(self.model.device, self.model.dtype) / _flops_per_token(self.model)

    @cached_property
    def disk_rate(self) -> float:
        """Bytes per second, from reading up to 256 MB."""
        return _measure_disk(self.checkpoint)

    def estimate(self) -> Estimate:
        """What `run` would take; measures matrix products and reading for about a second."""
        model, device = self.model, self.model.device
        memory = self.memory()
        padded = sum(batch.input_ids_BT.size for batch in self.batches)
        read = model.nbytes_per_pass * len(self.waves)
        seconds = max(padded * len(model.layers) / self.compute_rate, read / self.disk_rate)
        sums = len(self.data.domains) * NUM_FOLDS * (6 * self.layout.num_experts + 1) + self.layout.num_experts
        return Estimate(
            tokens=self.data.num_tokens,
            documents=len(self.data.documents),
            batches=len(self.batches),
            waves=len(self.waves),
            hours=seconds / 3600,
            device_bytes=sum(memory.values()),
            held_bytes=self.held_bytes,
            place=self.place,
            read_bytes=read,
            moved_bytes=self._moved_bytes(),
            output_bytes=8 * sums * len(self.layout.layers),
            reroute_bytes=0 if self.recorder is None else self.sample_header().nbytes,
            compute_rate=self.compute_rate,
            disk_rate=self.disk_rate,
            device=str(device),
            dtype=self.settings["dtype"],
        )

    @property
    def held_bytes(self) -> int:
        """Bytes of suspended activations in the largest wave."""
        per_token = bytes_per_token(self.model)
        return max((sum(held_bytes(batch, per_token) for batch in wave) for wave in self.waves), default=0)

    def memory(self) -> dict[str, int]:
        """Bytes that a run takes on the device, on a CPU besides the process itself, by what they are for."""
        model = self.model
        largest = max(held_bytes(batch, bytes_per_token(model)) for batch in self.batches)
        return {
            "two layers": 2 * model.layer_nbytes,
            "embeddings": model.entry_nbytes,
            ACTIVATIONS: self.held_bytes if self.place == "device" else min(self.held_bytes, RESIDENT * largest),
            "a running micro-batch": max(
                _batch_bytes(model, batch.input_ids_BT.size, length=batch.input_ids_BT.shape[1])
                for batch in self.batches
            ),
            "workspaces": WORKSPACES[model.device.type],
        }

    def require_memory(self) -> None:
        """Raise ResourceError, with the numbers and what to lower, where the device has less memory free than a run takes."""
        if self.place == "host" and self.held_bytes > (free := self._free(torch.device("cpu"))):
            raise ResourceError(
                f"suspended activations take {self.held_bytes / 1e9:,.2f} GB of the host's memory, and {free / 1e9:,.2f} GB are free",
                hint=f"--activation-budget {int(free * BUDGET_SHARE['cpu']) // 1_000_000}MB",
            )
        memory, free = self.memory(), self._free(self.model.device)
        if sum(memory.values()) <= free:
            return
        spared = free - sum(size for part, size in memory.items() if part != ACTIVATIONS)
        smallest = max(held_bytes(batch, bytes_per_token(self.model)) for batch in self.batches)
        raise ResourceError(
            f"observing takes {sum(memory.values()) / 1e9:,.2f} GB on {self.model.device}, and {free / 1e9:,.2f} GB are free: "
            + _parts(memory),
            hint=f"--activation-budget {spared // 1_000_000}MB"
            if spared > max(smallest, 1_000_000)
            else "free some memory, or run where there is more: one layer and one micro-batch must fit",
        )

    def _free(self, device: torch.device) -> int:
        """Bytes free on a device; of a host's memory the share of one of the ranks that are there."""
        return free_memory(device) // (self.ranks.local_count if device.type == "cpu" else 1)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what was held where memory runs out all the same: others may take it during the run."""
        try:
            yield
        except (RuntimeError, MemoryError, OSError) as error:
            spent = _spent(error, str(self.model.device))
            if spent is None:
                raise
            held = self.held_bytes
            raise ResourceError(
                f"{spent}: observing was to take {_parts(self.memory())}",
                hint=f"repeat the command with --activation-budget {max(held // 2_000_000, 1)}MB: it goes on where it stopped",
            ) from error

    def write(self, path: Path, *, progress: Progress = silent) -> Statistics:
        """Observe all waves into a statistics file; the same call goes on where an interrupted one stopped.

        Raises:
            DataError, ResourceError: as in `run`.
            OutputError: another run is writing to the file, or the system refuses.
        """
        own, ranks = self.ranks.own(path), self.ranks
        with deferred("the running wave is done"), ExitStack() as stack:
            for target in {own, path} if ranks.rank == 0 else {own}:
                stack.enter_context(alone(target, lock_of(target)))
            stack.enter_context(ranks.joined())
            sample = None if self.recorder is None else beside(path)
            statistics = self.run(progress=progress, keep=unfinished(own), sample=sample)
            if ranks.rank == 0:
                statistics.save(path)
            ranks.wait()  # until they are saved, each rank keeps its own
            discard(unfinished(own))
        return statistics

    def run(self, *, progress: Progress = silent, keep: Path | None = None, sample: Path | None = None) -> Statistics:
        """Observe all waves; of several ranks, which must be joined, each gets the sums of all.

        Args:
            progress: told how far it is.
            keep: a file that holds the sums of the waves done so far, until all are; what an interrupted run left there is gone on
                with, to the same bits.
            sample: where sampled tokens go, needed where they are gathered.

        Raises:
            DataError: an activation is NaN or infinite; layer, expert and micro-batch are named. Or the file is another run's.
            ResourceError: the device has too little memory.
            OutputError: the file cannot be written.
        """
        self.require_memory()
        if self.recorder is None:
            with self._explained(), self._disk(keep) as disk:
                return self._run(progress, keep, disk, None)
        assert sample is not None, "a sample of tokens needs a file"
        with (
            self._explained(),
            self._disk(keep) as disk,
            self._filling(sample, keep) as writer,
            self.recorder.watching(),
        ):
            return self._run(progress, keep, disk, writer)

    @contextmanager
    def _disk(self, keep: Path | None) -> Iterator[Disk | None]:
        """Where layers that come through the network are put: beside the file that is worked towards."""
        window, remote_bytes = self._window()
        if not remote_bytes:
            yield None
            return
        with ExitStack() as stack:
            folder = (
                keep.with_name(keep.name + ".weights")
                if keep is not None
                else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reapkit-")), "weights")
            )
            budget = self._disk_budget or self._useful_budget(folder, window, remote_bytes)
            yield stack.enter_context(Disk.opened(folder, budget=budget, window=window))

    def _moved_bytes(self) -> int:
        """Bytes through the network over all waves; what the disk keeps of one wave, the next ones need not fetch."""
        window, remote_bytes = self._window()
        budget = self._disk_budget or self._useful_budget(Path("weights"), window, remote_bytes)
        return remote_bytes + (len(self.waves) - 1) * max(0, remote_bytes - max(0, budget - window))

    def _window(self) -> tuple[int, int]:
        """Bytes through the network: the two largest parts of a pass that follow each other, and all of one pass."""
        source = self.checkpoint.source
        if self.checkpoint.remote is None:
            return 0, 0
        stages = [
            sum(info.nbytes for info in set(stage) if source.local(info.file) is None)
            for stage in self.model.stages(with_mtp=self.model.mtp is not None)
        ]
        return max(map(sum, itertools.pairwise(stages))), sum(stages)

    def _useful_budget(self, folder: Path, window: int, remote_bytes: int) -> int:
        """What is read once needs no place beyond the window; what is read again may have half of the disk that is free."""
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
        again = remote_bytes if len(self.waves) > 1 else 0
        return window + min(again, max(0, shutil.disk_usage(existing).free // 2 - window))

    @contextmanager
    def _filling(self, sample: Path, keep: Path | None) -> Iterator[SampleWriter]:
        """The file that all ranks write sampled tokens to, whole when this ends without an error."""
        assert self.recorder is not None
        header, ranks = self.sample_header(), self.ranks
        ranks.require_shared(sample)
        # Whichever rank has sums already has written its part of the sample with them.
        begun = [own for own in ranks.gather(keep if keep is not None and keep.exists() else None) if own is not None]
        if begun and not unfinished(sample).exists() and not sample.exists():
            names = ", ".join(map(str, begun))
            raise DataError(
                f"{names}: sums of an interrupted run, and the sample of tokens that belongs to them is missing",
                hint=f"remove {names} to begin again",
            )
        ranks.wait()  # until all have looked for it
        if ranks.rank == 0:
            require_space(sample, header)
            SampleWriter(sample, header).close()
        ranks.wait()
        writer = SampleWriter(sample, header)
        try:
            self.recorder.begin(writer)
            yield writer
            writer.sync()
            ranks.wait()
            if ranks.rank == 0:
                writer.finish()
        finally:
            writer.close()

    def gathered(self, sample: Path) -> bool:
        """Whether a finished sample of tokens is the one that `run` would gather."""
        return sample.is_file() and RoutedSamples.open(sample).header == self.sample_header()

    def sample_header(self) -> SampleHeader:
        """What the sample of tokens is of."""
        assert self.recorder is not None
        return SampleHeader(
            self.source, self.settings, self.data.digest, self.seed, self.data.domains, len(self.recorder.sample),
            self.recorder.candidates, dict.fromkeys(self.recorder.layers, self.recorder.rule),
        )  # fmt: skip

    def _run(self, progress: Progress, keep: Path | None, disk: Disk | None, writer: SampleWriter | None) -> Statistics:
        num_rows = len(self.data.domains) * NUM_FOLDS
        observed = self.layout.layer_indices + (self.layout.mtp_indices if self.model.mtp is not None else ())
        layers = {index: LayerStatistics.zeros(num_rows, self.layout.num_experts) for index in observed}
        passes = len({*range(len(self.model.layers)), *observed})
        tokens = sum(int(batch.length_B.sum()) for batch in self.batches)
        finished, waves = 0, self.waves
        if (begun := self._begun(keep)) is not None:
            layers |= begun.layers
            finished = begun.finished_batches
            waves = self._split(self.batches[finished:])
        model = self.model
        sums = RoutedSums(layers, num_layers=self.layout.num_layers, device=model.device, kernels=model.kernels)
        total, done = passes * tokens, passes * sum(int(batch.length_B.sum()) for batch in self.batches[:finished])
        progress("observe", done, total, "tokens x layers")
        for wave in waves:
            numbers = [self.ranks.number(place) for place in range(finished, finished + len(wave))]
            observers = [sums.observer(batch, number) for batch, number in zip(wave, numbers, strict=True)]
            if self.recorder is not None and writer is not None:
                observers = [
                    self.recorder.observer(number, observe, is_last=number == numbers[-1])
                    for number, observe in zip(numbers, observers, strict=True)
                ]

            def after_batch(layer: int, number: int, *, wave: Sequence[CalibrationBatch] = wave) -> None:
                nonlocal done
                if number == len(wave) - 1:
                    sums.require_finite(layer)
                    if self.recorder is not None and writer is not None:
                        self.recorder.flush(layer, writer)
                done += int(wave[number].length_B.sum())
                progress("observe", done, total, "tokens x layers")

            inputs, images = [batch.input_ids_BT for batch in wave], [batch.images for batch in wave]
            with SuspendedForwards(
                model, inputs, images=images, observe=observers, place=self.place, keep_outputs=False
            ) as forwards:
                forwards.run_layers(after_batch, disk=disk)
            finished += len(wave)
            # A rank that is done keeps its share until all are.
            if keep is not None and (finished < len(self.batches) or self.ranks.count > 1):
                if writer is not None:
                    writer.sync()
                batches = {"batches": len(self.batches), "finished_batches": finished}
                self._described(sums.totals(), **batches).save(keep)
                safe_point()
            if self.until is not None and finished < len(self.batches):
                agreement = agreement_of_halves(self._described(sums.totals()), keep=self._keep)
                if agreement >= self.until.agreement:
                    progress("observe", total, total, "tokens x layers")
                    break
        layers = self.ranks.add(sums.totals())
        is_whole = finished == len(self.batches)
        seen_lengths = [batch.length_B for batch in self.batches[:finished]]
        lengths = (
            np.array([len(document.input_ids) for document in self.data.documents])
            if is_whole
            else np.concatenate(seen_lengths)
        )
        for index, layer in layers.items():
            layer.require_finite(index)
            ahead = tokens_ahead(index, self.layout.num_layers)
            expected = int((lengths - ahead).clip(0).sum())
            if (seen := int(layer.tokens_S.sum())) != expected:
                raise UnsupportedError(
                    f"layer {index} sent {seen:,} of {expected:,} tokens through transformers' experts function, "
                    "so its experts cannot be observed"
                )
        whole = self._described(layers)
        return whole if is_whole else replace(whole, calibration=(self._first_part(finished),))

    def _first_part(self, finished: int) -> CalibrationRecord:
        """The record of text that was not observed to its end: other text than the whole, as far as sums go."""
        tokens = sum(int(batch.length_B.sum()) for batch in self.batches[:finished])
        digest = hashlib.sha256(f"{self.data.digest} first {finished} of {len(self.batches)}".encode()).hexdigest()
        return CalibrationRecord(digest, tokens, self.seed, tuple(source.to_json() for source in self.data.sources))

    def _begun(self, keep: Path | None) -> Statistics | None:
        """What an interrupted run of the same observation left."""
        if keep is None or not keep.exists():
            return None
        begun = Statistics.load(keep, unfinished=True)
        require_commit(keep, begun, self.source, "holds the sums of an interrupted run")
        what = self.differing(begun) or ("micro-batches" if begun.batches != len(self.batches) else None)
        if what is not None:
            raise DataError(
                f"{keep} holds the sums of an interrupted run on another model, text or settings: other {what}",
                hint="repeat the command that began it, or remove the file",
            )
        return begun

    def _described(self, layers: Mapping[int, LayerStatistics], **progress: Any) -> Statistics:
        record = CalibrationRecord(
            self.data.digest, self.data.num_tokens, self.seed, tuple(source.to_json() for source in self.data.sources)
        )
        return Statistics(
            source=self.source,
            num_experts=self.layout.num_experts,
            top_k=self.layout.top_k,
            num_groups=self.layout.num_groups,
            domains=self.data.domains,
            settings=self.settings,
            calibration=(record,),
            unobserved=tuple(index for index in self.layout.mtp_indices if index not in layers),
            layers=layers,
            **progress,
        )

    def differing(self, statistics: Statistics) -> str | None:
        """What tells statistics from those that `run` would measure: the model by its fingerprints, a setting, or the text."""
        if (what := differing(self.source, self.settings, statistics.source, statistics.settings)) is not None:
            return what
        return None if [record.digest for record in statistics.calibration] == [self.data.digest] else "text"

    def _split(self, parts: Sequence[CalibrationBatch]) -> list[list[CalibrationBatch]]:
        """Waves that hold the budget, and that are short enough not to lose hours with one."""
        if not parts:
            return []
        model = self.model
        layer_tokens = sum(batch.input_ids_BT.size for batch in parts) * len(model.layers)
        shortest = 1
        if layer_tokens * _flops_per_token(model) > SLOWEST_FLOPS * WAVE_SECONDS:
            longest = max(WAVE_SECONDS, WAVE_READS * model.nbytes_per_pass / self.disk_rate)
            shortest = math.ceil(layer_tokens / self.compute_rate / longest)
        if self.until is not None:
            shortest = max(shortest, min(len(parts), SETTLING_WAVES))
        return split_into_waves(
            parts,
            budget=self.budget,
            bytes_per_token=bytes_per_token(model),
            max_batches=MAX_SUSPENDED,
            min_waves=shortest,
        )

    def _choose_place(self, run: Run) -> tuple[Place, int]:
        """Where suspended activations are kept, and how many bytes of them."""
        model = self.model
        on_device = run.activation_budget or default_budget(model, sharing=self.ranks.local_count)
        if run.place is None or run.place == "device":
            per_token = bytes_per_token(model)
            if run.place == "device" or model.device.type == "cpu" or run.activation_budget is not None:
                return "device", on_device
            if sum(held_bytes(batch, per_token) for batch in self.batches) <= on_device:
                return "device", on_device
            # A wave must compute for longer than it reads, or the device waits for the disk.
            seconds = on_device / per_token * len(model.layers) / self.compute_rate
            if seconds >= model.nbytes_per_pass / self.disk_rate:
                return "device", on_device
            on_host = int(self._free(torch.device("cpu")) * BUDGET_SHARE["cpu"])
            return ("host", on_host) if on_host > on_device else ("device", on_device)
        place = cast(Place, run.place)
        if run.activation_budget is not None:
            return place, run.activation_budget
        if place == "host":
            return place, int(self._free(torch.device("cpu")) * BUDGET_SHARE["cpu"])
        return place, int(shutil.disk_usage(tempfile.gettempdir()).free / self.ranks.local_count * BUDGET_SHARE["cpu"])


def observe(
    source: str | Path,
    data: Sequence[str] = ("reap-mix",),
    *,
    run: Run | None = None,
    max_length: int = 2048,
    seed: int = 0,
    revision: str | None = None,
    reroute: Reroute | None = None,
    sample: Path | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Measure on calibration text how much every expert contributes.

    Args:
        source: a checkpoint's folder or hub id.
        data: `--data` arguments: `[DOMAIN=]SOURCE[SUBSET](SPLIT)[:SAMPLES]`.
        run: device, dtype and memory; sensible for the machine by default.
        max_length: tokens per document; longer samples are split into windows.
        seed: of the choice of samples.
        revision: of a hub id.
        reroute: what to gather for re-routed errors, and sample: into which file.
        progress: told how far it is.
    """
    observation = Observation(
        source,
        data,
        run=run or Run(),
        max_length=max_length,
        seed=seed,
        revision=revision,
        reroute=reroute,
        progress=progress,
    )
    return observation.run(progress=progress, sample=sample)


def require_commit(path: Path, begun: Statistics, found: Identity, holds: str) -> None:
    """Raise DataError where a file's statistics are of another commit of the same repository, and say what tells the two apart."""
    if (moved := begun.source.moved(found)) is not None:
        raise DataError(
            f"{path} {holds} on {moved}",
            hint=f"--revision {begun.source.revision}, or leave --revision out: it goes on with that; or begin again elsewhere",
        )


def _spent(error: Exception, device: str) -> str | None:
    """What ran out, if it was memory or room for a thread, which takes address space too."""
    if "can't start new thread" in str(error):
        return "no more threads can be started, for want of memory or by the limit of processes (ulimit -u)"
    if isinstance(error, OSError):
        spent = error.errno == errno.ENOMEM
    else:  # torch's own class for a device, a plain RuntimeError of torch's for main memory
        spent = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return f"the memory of {device} ran out" if spent else None


def _parts(memory: Mapping[str, int]) -> str:
    return ", ".join(f"{size / 1e9:,.2f} GB for {part}" for part, size in memory.items())


def require_embeddings(data: CalibrationData, model: StreamedModel) -> None:
    """Raise CheckpointError where the tokenizer gives a token that the model has no embedding for."""
    for document in data.documents:
        lowest, largest = int(document.input_ids.min()), int(document.input_ids.max())
        if lowest < 0 or largest >= model.vocab_size:
            odd = lowest if lowest < 0 else largest
            raise CheckpointError(
                f"the tokenizer of {model.checkpoint.origin} gives the token {odd:,}, and the model has {model.vocab_size:,} embeddings",
                hint="is the tokenizer that of this model?",
            )


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over what turns rows into tokens: the vocabulary with its merges, and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    templates = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return hashlib.sha256(f"{templates}\n{words}".encode()).hexdigest()


def bytes_per_token(model: StreamedModel) -> int:
    """Bytes that a suspended token holds."""
    return HELD_STATES * model.hidden_size * torch.empty((), dtype=model.dtype).element_size()


def held_bytes(batch: CalibrationBatch, bytes_per_token: int) -> int:
    """Bytes that a suspended micro-batch holds."""
    size = batch.input_ids_BT.size * bytes_per_token
    return size if batch.images is None else IMAGES_FACTOR * size + batch.images.nbytes


def split_into_waves(
    parts: Sequence[CalibrationBatch], *, budget: int, bytes_per_token: int, max_batches: int, min_waves: int = 1
) -> list[list[CalibrationBatch]]:
    """Micro-batches in as few waves as hold the budget and the numbers of batches and waves, in order, and about equally long.

    Raises:
        UsageError: a single micro-batch is over the budget.
    """
    sizes = [held_bytes(batch, bytes_per_token) for batch in parts]
    if max(sizes) > budget:
        raise UsageError(
            f"an activation budget of {budget:,} bytes is less than the {max(sizes):,} that one micro-batch holds",
            hint=f"--activation-budget {max(sizes)} or more, or a shorter --max-length",
        )
    num_waves = max(-(-sum(sizes) // budget), -(-len(sizes) // max_batches), min_waves)
    target = sum(sizes) / num_waves
    waves: list[list[CalibrationBatch]] = [[]]
    held = 0
    for batch, size in zip(parts, sizes, strict=True):
        if waves[-1] and (held + size > budget or held >= target or len(waves[-1]) == max_batches):
            waves.append([])
            held = 0
        waves[-1].append(batch)
        held += size
    return waves


def default_budget(*models: StreamedModel, sharing: int = 1) -> int:
    """A share of the memory that is free once two layers are loaded, and on a GPU a micro-batch runs.

    Args:
        models: what is to run side by side on one device, two layers of each loaded.
        sharing: processes that share a host's memory.
    """
    device = models[0].device
    free = free_memory(device) // (sharing if device.type == "cpu" else 1)
    free -= sum(2 * model.layer_nbytes for model in models)
    if device.type == "cuda":
        free -= sum(model.entry_nbytes for model in models) + WORKSPACES["cuda"]
        free -= max(_batch_bytes(model, tokens_per_batch(model)) for model in models)
    return max(int(free * BUDGET_SHARE[device.type]), 1 << 20)


def tokens_per_batch(model: StreamedModel) -> int:
    """Tokens of a micro-batch: by the memory that a device has, and not by what is free, so that a run can be repeated to the bit."""
    count = TOKENS_PER_BATCH[model.device.type]
    if model.device.type == "cuda":
        taken = 2 * model.layer_nbytes + model.entry_nbytes + WORKSPACES["cuda"]
        room = WORKING_SHARE * total_memory(model.device) - taken
        while count > FEWEST_TOKENS and _batch_bytes(model, count) > room:
            count //= 2
    return count


def _batch_bytes(model: StreamedModel, tokens: int, *, length: int = 0) -> int:
    """Temporaries of a micro-batch in one MoE layer.

    Per routed pair the gathered input, both halves of the inner activation with their product, and the output; where the model's
    coefficients may be wider than 16 bits, the weighted output in float32 and that in the tokens' order. With fused kernels the input with
    both halves and their product, and later with the output; in FP8 the output, and that product in a byte each. Per token some ten hidden
    sizes for attention; in float32 on a GPU torch has no fused attention for grouped heads, so the scores of documents of a `length` are
    held, twice.
    """
    experts = next(part for layer in model.layers if (part := experts_of(layer)) is not None)
    weights = sum(parameter.numel() for parameter in experts.parameters())
    hidden, top_k = model.hidden_size, model.layout.top_k
    # An expert is three matrices between the hidden and the inner size, or two in families without a gate.
    inner = weights // model.layout.num_experts // hidden // (3 if experts.has_gate else 2)
    if model.kernels is None:
        pair = (2 if model.dtype == torch.float32 else 6) * hidden + 3 * inner
    elif model.fp8:
        pair = hidden + inner // 2
    else:
        pair = max(hidden + 3 * inner, 2 * hidden + inner)
    values = tokens * (top_k * pair + 10 * hidden)
    if model.device.type == "cuda" and model.dtype == torch.float32:
        values += 2 * tokens * length * model.num_heads
    return values * torch.empty((), dtype=model.dtype).element_size()


def _flops_per_token(model: StreamedModel) -> float:
    """Floating-point operations of one token in one layer, two per active weight; attention's products with T are left out."""
    total = 0.0
    for layer in model.layers:
        experts = experts_of(layer)
        all_weights = sum(parameter.numel() for parameter in layer.parameters())
        idle = sum(parameter.numel() for parameter in experts.parameters()) if experts is not None else 0
        total += all_weights - idle * (1 - model.layout.top_k / model.layout.num_experts)
    return 2 * total / len(model.layers)


def _measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate that a layer may be expected to reach, from that of a square matrix product."""
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    matrix @ matrix
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.3:
        for _ in range(10):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 10
    return LAYER_EFFICIENCY[device.type] * count * 2 * size**3 / elapsed


def _measure_disk(checkpoint: Checkpoint) -> float:
    """Rate of reading up to 256 MB of the largest shard, from the disk where the system forgets them first.

    Through a network it is that of what has come so far.
    """
    largest = max(checkpoint.files, key=checkpoint.source.size)
    path = checkpoint.source.local(largest)
    if path is None:
        assert checkpoint.remote is not None
        return _measured_rate(checkpoint.remote)
    total = 0
    with path.open("rb", buffering=0) as stream:
        # Else what an earlier measurement left in memory would speak for the disk.
        with suppress(OSError, AttributeError):
            os.posix_fadvise(stream.fileno(), 0, _MEASURED_BYTES, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while total < _MEASURED_BYTES and (chunk := stream.read(16 << 20)):
            total += len(chunk)
    return total / (time.perf_counter() - start)


def _measured_rate(remote: Remote) -> float:
    """Headers and fingerprints came in small pieces, so that layers will come faster."""
    return max(NUM_CONNECTIONS * remote.ranges.moved / max(remote.ranges.seconds, 1e-3), 1.0)
