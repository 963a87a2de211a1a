"""The plan behind a pruned checkpoint that somebody published: which of its parent's experts it kept, read from its router.

A kept expert's row of the router, and its selection bias, are its parent's bytes, whatever became of the experts' own format.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.errors import PlanError
from reapkit.layout import Identity, MoELayout
from reapkit.plans import PruningPlan
from reapkit.progress import Progress, silent
from reapkit.tensors import DTYPE_BITS

RECOVERED = "recovered"
# Of the options of choosing, those that mean something where the choice was another's.
USED = frozenset({"revision"})


def recover(
    parent: str | Path, pruned: str | Path, *, revision: str | None = None, progress: Progress = silent
) -> PruningPlan:
    """The experts that a pruned checkpoint kept of its parent.

    Args:
        parent: the checkpoint before pruning, its folder or hub id.
        pruned: the checkpoint after it, in any format.
        revision: of the parent's hub id.
        progress: told how headers and fingerprints come from the hub.

    Raises:
        PlanError: a row of a router is none of the parent's, or several of the parent's are alike and not all of them were kept.
    """
    whole, part = (
        Checkpoint.open(parent, revision=revision, progress=progress),
        Checkpoint.open(pruned, progress=progress),
    )
    layout, cut = layouts.resolve(whole, ARCHITECTURES), layouts.resolve(part, ARCHITECTURES)
    if layout.architecture.name != cut.architecture.name or layout.num_layers != cut.num_layers:
        raise PlanError(
            f"{part.origin} ({cut.architecture.name}, {cut.num_layers} layers) is not pruned from {whole.origin} "
            f"({layout.architecture.name}, {layout.num_layers} layers)"
        )
    before, after = _router_rows(whole, layout), _router_rows(part, cut)
    if apart := sorted(set(before) - set(after) - set(layout.mtp_indices)):
        raise PlanError(f"{part.origin} has no router in layer {apart[0]}, where {whole.origin} has one")
    kept = {index: _match(index, before[index], after[index]) for index in before if index in after}
    return PruningPlan(
        source=Identity.of(whole, layout),
        criterion=RECOVERED,
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        kept=kept,
        drop_mtp=bool(set(layout.mtp_indices) - set(after)),
        options={"recovered-from": part.origin},
    )


def _router_rows(checkpoint: Checkpoint, layout: MoELayout) -> dict[int, list[bytes]]:
    """By layer, what the router and the selection bias hold for every expert."""
    rows: dict[int, list[bytes]] = {}
    for name in sorted(layout.router_names):
        index, stacked = layout.stacked_of[name]
        info = stacked.info
        values: np.ndarray[Any, Any] = np.frombuffer(checkpoint.read(info), dtype=np.uint8)
        by_entry = np.moveaxis(values.reshape(*info.shape, DTYPE_BITS[info.dtype] // 8), stacked.axis, 0)
        parts = [by_entry[expert].tobytes() for expert in range(layout.num_experts)]
        rows[index] = [one + other for one, other in zip(rows.get(index, [b""] * len(parts)), parts, strict=True)]
    return rows


def _match(layer: int, before: list[bytes], after: list[bytes]) -> tuple[int, ...]:
    experts_of: dict[bytes, list[int]] = defaultdict(list)
    for expert, row in enumerate(before):
        experts_of[row].append(expert)
    rows_of: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(after):
        rows_of[row].append(place)
    kept: list[int] = []
    for row, places in rows_of.items():
        if row not in experts_of:
            raise PlanError(
                f"the router of layer {layer} has a row (expert {places[0]} of {len(after)}) that is none of the parent's {len(before)}",
                hint="the parent is another one, its router was trained on, or experts were merged",
            )
        alike = experts_of[row]
        if len(alike) != len(places):
            raise PlanError(
                f"the experts {', '.join(map(str, alike))} of layer {layer} have the same row in the parent's router, and "
                f"{len(places)} of them stayed: which cannot be told"
            )
        kept += alike
    return tuple(sorted(kept))
