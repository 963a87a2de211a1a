"""The whole way in one call: observe, plan, prune, verify, each stage's result a file that a repeated run takes up again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapkit import criteria, hub, plans, shards
from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import STATISTICS_NAME, Checkpoint
from reapkit.criteria import AIMER, OF_SAMPLE, Blend
from reapkit.elimination import check_weights
from reapkit.errors import DataError
from reapkit.landing import Transfer
from reapkit.layout import Architecture, MoELayout
from reapkit.outputs import alone, discard, lock_of, unfinished
from reapkit.plans import Choice, PruningPlan
from reapkit.progress import Progress, silent
from reapkit.samples import beside
from reapkit.shards import Manifest
from reapkit.statistics import Statistics, begun_at
from reapkit.verification import Verification, verify

if TYPE_CHECKING:  # pruning imports no torch: it is copying, and starts at once
    from reapkit.observation import Observation, Run
    from reapkit.rerouting import Reroute


@dataclass(frozen=True)
class Target:
    """How much to remove, by which criterion.

    Attributes:
        ratio: share of the experts to remove, read as a decimal; or
        keep: number of experts to keep per layer.
        criterion: a name in `criteria.CRITERIA` or `criteria.OTHERS`.
        weights: of tokens, under `reroute`.
        blend, protect: as in `plans.choose`.
        reroute_tokens, reroute_candidates: how much is gathered for `reroute` and `easy-ep`, and for them alone.
        divisible_by: as in `plans.choose`.
    """

    ratio: str | float | None = None
    keep: int | None = None
    criterion: str = "reap"
    weights: str = "residual"
    blend: str | None = None
    protect: str | None = None
    reroute_tokens: int = 32768
    reroute_candidates: int = 16
    divisible_by: int = 1

    @property
    def size(self) -> dict[str, Any]:
        """What decides how many experts stay."""
        return {"ratio": self.ratio, "keep": self.keep, "divisible_by": self.divisible_by}

    @property
    def reroute(self) -> Reroute | None:
        """What observing must gather besides sums."""
        from reapkit.rerouting import Reroute

        return Reroute(self.reroute_tokens, self.reroute_candidates) if self.criterion in OF_SAMPLE else None


@dataclass(frozen=True)
class Compression:
    """What each stage brought."""

    architecture: Architecture
    statistics: Path
    choice: Choice
    manifest: Manifest
    verification: Verification


def open_planned(
    source: str | Path, plan: PruningPlan, *, revision: str | None = None, progress: Progress = silent
) -> Checkpoint:
    """The checkpoint to prune: of the repository that the plan names, at the plan's revision unless another is given."""
    named = hub.parse(str(source))
    if revision is None and named == (plan.source.origin, None) and not Path(source).exists():
        revision = plan.source.revision
    return Checkpoint.open(source, revision=revision, progress=progress)


def prune(
    source: Checkpoint | str | Path,
    plan: PruningPlan | str | Path,
    out: str | Path,
    *,
    dequantize: bool = False,
    base_model: str | None = None,
    mtp: str | None = None,
    allow_missing_scales: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Write the checkpoint that a plan leaves: the source's bytes, re-sliced.

    Args:
        source: a checkpoint, its folder or hub id.
        plan: the plan, its file, or `hub://ORG/NAME[@REVISION]` where it was published.
        out: a new folder; an interrupted run's is gone on with.
        dequantize: write quantised weights as bf16 instead.
        base_model: the hub id to record as the parent.
        mtp: what becomes of MTP layers with experts, which calibration never runs: `same-as-last` (the kept set of the last decoder
            layer; the default), `same-as-layer-N`, or `drop`.
        allow_missing_scales: go on where a kept expert lacks a scale that others have.
        revision: of a hub id; by default the plan's, where it names the same repository.
        dry_run: check and describe, and write nothing.
        progress: told how far it is.

    Raises:
        PlanError: the plan is for another model.
        OutputError: the folder cannot be written.
    """
    chosen = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    checkpoint = (
        source if isinstance(source, Checkpoint) else open_planned(source, chosen, revision=revision, progress=progress)
    )
    layout = layouts.resolve(checkpoint, ARCHITECTURES)
    return shards.write(
        checkpoint,
        layout,
        chosen,
        Path(out),
        dequantize=dequantize,
        base_model=base_model,
        mtp=mtp,
        allow_missing_scales=allow_missing_scales,
        dry_run=dry_run,
        progress=progress,
    )


def transfer(
    checkpoint: Checkpoint, plan: PruningPlan, *, dequantize: bool = False, mtp: str | None = None
) -> Transfer:
    """What pruning a checkpoint by a plan moves through the network, beside the headers and fingerprints read by then."""
    return shards.transfer(checkpoint, layouts.resolve(checkpoint, ARCHITECTURES), plan, dequantize=dequantize, mtp=mtp)


def compress(
    source: str | Path,
    out: str | Path,
    target: Target,
    *,
    data: Sequence[str] = ("reap-mix",),
    run: Run | None = None,
    max_length: int = 2048,
    seed: int = 0,
    revision: str | None = None,
    dequantize: bool = False,
    base_model: str | None = None,
    mtp: str | None = None,
    allow_missing_scales: bool = False,
    progress: Progress = silent,
) -> Compression:
    """Observe, plan, prune and verify.

    The statistics are kept in `out/reapkit/`; the same command, repeated after an interruption, does not observe again, and repeated
    after its end only verifies.

    Args:
        source: a checkpoint's folder or hub id.
        out: a new folder.
        target: how much to remove, by which criterion.
        data, run, max_length, seed, revision: as in `observe`; a repeated call without a revision stays with the commit that it began with.
        dequantize, base_model, mtp, allow_missing_scales: as in `prune`.
        progress: told how far it is.
    """
    out = Path(out)
    observation, _ = prepare(
        source,
        out,
        target,
        data=data,
        run=run,
        max_length=max_length,
        seed=seed,
        revision=revision,
        dequantize=dequantize,
        mtp=mtp,
        allow_missing_scales=allow_missing_scales,
        progress=progress,
    )
    path = out / STATISTICS_NAME
    statistics = observed_before(path, observation)
    if statistics is None:
        statistics = observation.write(path, progress=progress)
    else:
        with alone(path, lock_of(path)):  # which a run that was killed right after it saved them may have left
            discard(unfinished(path))
    choice = choose_by_weights(
        observation.checkpoint, observation.layout, **target.size, progress=progress
    ) if target.criterion == AIMER else plans.choose(
        statistics, criterion=target.criterion, **target.size, weights=target.weights, blend=target.blend,
        protect=target.protect, seed=seed, sample=beside(path), progress=progress,
    )  # fmt: skip
    manifest = shards.write(
        observation.checkpoint,
        observation.layout,
        choice.plan,
        out,
        dequantize=dequantize,
        base_model=base_model,
        mtp=mtp,
        allow_missing_scales=allow_missing_scales,
        progress=progress,
    )
    choice = replace(choice, plan=choice.plan.for_layout(observation.layout, mtp))
    return Compression(
        observation.layout.architecture,
        path,
        choice,
        manifest,
        verify(out, source=observation.checkpoint, progress=progress),
    )


def choose_by_weights(
    source: Checkpoint | str | Path,
    layout: MoELayout | None = None,
    *,
    ratio: str | float | None = None,
    keep: int | None = None,
    divisible_by: int = 1,
    revision: str | None = None,
    progress: Progress = silent,
) -> Choice:
    """Choose by the criterion `aimer`, which reads a checkpoint's weights and needs no text."""
    checkpoint = (
        source if isinstance(source, Checkpoint) else Checkpoint.open(source, revision=revision, progress=progress)
    )
    layout = layout or layouts.resolve(checkpoint, ARCHITECTURES)
    plans.require_target(layout, criterion=AIMER, ratio=ratio, keep=keep, divisible_by=divisible_by)
    from reapkit.magnitudes import score_by_weights

    scores = score_by_weights(checkpoint, layout, progress=progress)
    return plans.choose_for_checkpoint(
        checkpoint, layout, ratio=ratio, keep=keep, divisible_by=divisible_by, scores=scores
    )


def prepare(
    source: str | Path,
    out: Path,
    target: Target,
    *,
    data: Sequence[str],
    run: Run | None,
    max_length: int,
    seed: int,
    revision: str | None,
    dequantize: bool,
    mtp: str | None,
    allow_missing_scales: bool,
    progress: Progress = silent,
) -> tuple[Observation, Manifest]:
    """Whatever can fail before hours of observing are spent: target, output folder, format, space, data.

    Returns:
        The observation, and the manifest of an output of the same size that keeps other experts.
    """
    check_weights(target.weights)
    changed = [part.name for part in fields(target) if getattr(target, part.name) != part.default]
    criteria.require_used(target.criterion, changed)
    revision = revision or begun_with(source, out)
    checkpoint = Checkpoint.open(source, revision=revision, progress=progress)
    layout = layouts.resolve(checkpoint, ARCHITECTURES)
    plans.require_target(layout, criterion=target.criterion, **target.size)
    if not allow_missing_scales:  # which experts stay is not known yet
        shards.require_scales(
            layout, dict.fromkeys((layer.index for layer in layout.layers), range(layout.num_experts))
        )
    other = plans.choose_for_checkpoint(checkpoint, layout, **target.size)
    done = shards.finished(out)
    if done is not None and (out / STATISTICS_NAME).exists():
        manifest = done  # whether it is this command's shows when the plan is made again from these statistics
    else:
        manifest = shards.write(
            checkpoint,
            layout,
            other.plan,
            out,
            dequantize=dequantize,
            mtp=mtp,
            allow_missing_scales=True,
            dry_run=True,
        )
    from reapkit.observation import Observation, Run

    plans.require_protection(target.protect)
    observation = Observation(
        checkpoint, data, run=run or Run(), max_length=max_length, seed=seed, reroute=target.reroute
    )
    if target.blend is not None:
        Blend.parse(target.blend, observation.data.domains)
    return observation, manifest


def begun_with(source: str | Path, out: Path) -> str | None:
    """The commit of a repository on the hub with which an interrupted or finished run filled the folder: the same command stays with it."""
    path = out / STATISTICS_NAME
    return begun_at(path, source) or begun_at(unfinished(path), source)


def observed_before(path: Path, observation: Observation) -> Statistics | None:
    """The statistics that an interrupted run left, if they are of this model, text and settings."""
    from reapkit.observation import require_commit

    if not path.exists():
        return None
    statistics = Statistics.load(path)
    require_commit(path, statistics, observation.source, "was observed")
    if (what := observation.differing(statistics)) is None:
        if observation.recorder is not None and not observation.gathered(beside(path)):
            return None
        return statistics
    raise DataError(
        f"{path} was observed on another model, text or settings: other {what}",
        hint="repeat the command that began this output, or give another folder",
    )
