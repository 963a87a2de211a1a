"""Merging: the baselines that make several experts one, written as genuinely smaller checkpoints.

Three steps, each one's result a file in `OUT/reapkit/` that a repeated run takes up: the similarity of experts, measured on a sample of
text; the orders in which their neurons match; the checkpoint. No more than one layer's experts are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from reapkit import clusters, plans, shards, similarity
from reapkit.checkpoint import Checkpoint
from reapkit.clusters import METHODS, Merging, Similarity
from reapkit.edits import Orders
from reapkit.errors import DataError, PlanError, UnsupportedError
from reapkit.interrupts import deferred, safe_point
from reapkit.layout import MoELayout
from reapkit.neurons import ORDERS_NAME, ExpertTensors, align, encode_orders
from reapkit.observation import Observation, Run
from reapkit.outputs import alone, save
from reapkit.plans import PruningPlan
from reapkit.progress import Progress, silent
from reapkit.quantization import HINT, Format, read_format
from reapkit.shards import LOCK_NAME, Manifest
from reapkit.similarity import SIMILARITY_NAME, Similarities
from reapkit.statistics import Statistics


def merge(
    source: str | Path,
    statistics: Statistics | str | Path,
    out: str | Path,
    *,
    method: str,
    ratio: str | float | None = None,
    keep: int | None = None,
    router: str | None = None,
    data: Sequence[str] = ("reap-mix",),
    tokens: int = similarity.SAMPLE_TOKENS,
    run: Run | None = None,
    max_length: int = 2048,
    seed: int = 0,
    base_model: str | None = None,
    mtp: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    measured: Similarities | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Write a checkpoint whose experts are averages of groups of the source's; quantised weights become bf16.

    Args:
        source: a checkpoint's folder or hub id.
        statistics: of this checkpoint, or their file: frequencies and saliency.
        out: a new folder; an interrupted run's is gone on with.
        method: a name in `clusters.METHODS`.
        ratio: share of the experts to remove, read as a decimal; or
        keep: number of experts to keep per layer.
        router: `average` or `centre`; None takes the method's own.
        data: text on which similarity is measured, as in `observe`.
        tokens: of it, how many.
        run, max_length, seed, revision: as in `observe`.
        base_model, mtp: as in `prune`; MTP layers are not merged, they keep the centres of the layer that they follow.
        dry_run: check and describe, and write nothing: every expert stays alone.
        measured: similarities that are there already.
        progress: told how far it is.

    Raises:
        PlanError: the statistics are of another model, or fewer experts would stay than each token is routed to.
        OutputError: the folder holds another output, finished or not; nothing is measured for it.
        UnsupportedError: experts that cannot be run on other tokens, whose neurons are not known, or whose values cannot be computed.
    """
    chosen, out = clusters.method_of(method, router), Path(out)
    observation = Observation(
        source, data, run=run or Run(), max_length=max_length, seed=seed, revision=revision, progress=progress
    )
    checkpoint, layout, form = observation.checkpoint, observation.layout, read_format(observation.checkpoint)
    if checkpoint.remote is not None and any(checkpoint.remote.local(file) is None for file in checkpoint.files):
        raise UnsupportedError(
            f"merging reads every expert of {checkpoint.origin} several times, so all of it must be here",
            hint=f"hf download {checkpoint.origin}, then give the folder",
        )
    if form.obstacle is not None:
        raise UnsupportedError(form.obstacle, hint=HINT)
    found = statistics if isinstance(statistics, Statistics) else Statistics.load(Path(statistics))
    if (what := found.source.differing(observation.source)) is not None:
        raise PlanError(
            f"the statistics are of {found.source.origin}, and {checkpoint.origin} has other {what}",
            hint="observe this checkpoint first",
        )
    count = plans.require_target(layout, criterion="reap", ratio=ratio, keep=keep)
    for layer in layout.layers if chosen.alignment is not None else ():
        ExpertTensors(checkpoint, layout, layer, form)  # which refuses what it does not know, before any work
    if dry_run:
        return shards.write(
            checkpoint, layout, _described(observation, found, method, count), out, dequantize=form.quantized, base_model=base_model,
            mtp=mtp, dry_run=True,
        )  # fmt: skip
    done = shards.finished(out)
    if done is None:
        shards.refuse_folder(checkpoint, out)
    similarities = measured or _similarities(observation, out, tokens, progress)
    merging = Merging(
        method=method,
        router=router or chosen.router,
        groups={
            index: clusters.merge_layer(
                chosen, found.layers[index], similarities.layers[index], keep=count, num_groups=layout.num_groups
            )
            for index in layout.layer_indices
        },
        tokens=similarities.tokens,
        digest=similarities.digest,
    )
    shards.refuse_other_merging(checkpoint, out, merging)
    orders = match_neurons(checkpoint, layout, form, merging, similarities.layers, progress=progress)
    if orders:
        content, digest = encode_orders(orders)
        merging = replace(merging, alignment=digest)
        if done is None:
            with alone(out, out / LOCK_NAME):
                save(out / ORDERS_NAME, content)
    plan = PruningPlan(
        source=found.source,
        criterion=method,
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        kept=merging.kept,
        calibration=tuple(record.digest for record in found.calibration),
    )
    return shards.write(
        checkpoint,
        layout,
        plan,
        out,
        dequantize=form.quantized,
        base_model=base_model,
        mtp=mtp,
        merging=merging,
        orders=orders,
        progress=progress,
    )


def _all(merging: Merging) -> list[clusters.Group]:
    return [group for groups in merging.groups.values() for group in groups]


def _described(observation: Observation, statistics: Statistics, method: str, count: int) -> PruningPlan:
    """A plan of the size that merging would leave."""
    layout = observation.layout
    kept = plans.choose_for_checkpoint(observation.checkpoint, layout, keep=count).plan.kept
    kept = {index: kept[index] for index in layout.layer_indices}
    return PruningPlan(statistics.source, method, layout.num_experts, layout.top_k, kept)


def _similarities(observation: Observation, out: Path, tokens: int, progress: Progress) -> Similarities:
    """Measured, or what an interrupted run of the same measured."""
    path = out / SIMILARITY_NAME
    if path.exists():
        found = Similarities.load(path)
        if (what := similarity.differing(found, observation, tokens=tokens)) is None:
            return found
        raise DataError(
            f"{path} was measured on another model, text or settings: other {what}",
            hint="repeat the command that began this output, or give another folder",
        )
    shards.refuse_other_merging(observation.checkpoint, out, None)
    found = similarity.measure(observation, tokens=tokens, progress=progress)
    with deferred("the similarity of experts is saved"), alone(out, out / LOCK_NAME):
        found.save(path)
    return found


def match_neurons(
    checkpoint: Checkpoint,
    layout: MoELayout,
    form: Format,
    merging: Merging,
    similarities: Mapping[int, Similarity],
    *,
    progress: Progress = silent,
) -> Orders:
    """By layer, the order of every expert's neurons in which they match its centre's, int32 [E, I]; none where it matches none."""
    if (by := METHODS[merging.method].alignment) is None or all(len(group.members) == 1 for group in _all(merging)):
        return {}
    total, done = sum(len(group.members) - 1 for group in _all(merging)), 0
    orders = {}
    with deferred("the running layer is aligned"):
        for layer in layout.layers:
            if layer.index not in merging.groups:
                continue
            tensors = ExpertTensors(checkpoint, layout, layer, form)
            inputs_ND = torch.from_numpy(similarities[layer.index].inputs_ND)
            order_EI = np.tile(np.arange(tensors.num_neurons, dtype=np.int32), (layout.num_experts, 1))
            for group in merging.groups[layer.index]:
                if len(group.members) > 1:
                    for expert, order_I in align(
                        tensors, group.centre, group.members[1:], by=by, inputs_ND=inputs_ND
                    ).items():
                        order_EI[expert] = order_I
                    done += len(group.members) - 1
                    progress("aligning", done, total, "experts")
            orders[layer.index] = order_EI
            safe_point()
    return orders
