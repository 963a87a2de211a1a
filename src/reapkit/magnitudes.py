"""A criterion that needs no text: how evenly the magnitudes of an expert's weights are spread (AIMER, arXiv 2603.18492).

Weights are read layer by layer, on-disk formats dequantised; nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from reapkit.checkpoint import Checkpoint
from reapkit.criteria import AIMER, Scores
from reapkit.formats import decode
from reapkit.layout import MoELayer, MoELayout
from reapkit.progress import Progress, silent
from reapkit.quantization import Format, read_format
from reapkit.tensors import TensorInfo


def score_by_weights(checkpoint: Checkpoint, layout: MoELayout, *, progress: Progress = silent) -> Scores:
    """Scores of every layer with experts, MTP layers too.

    AIMER of an expert is ‖w‖₁ / (sqrt(N) ‖w‖₂) over its N weights, from 1 / sqrt(N) where a single one is not zero to 1 where all are as
    large; the highest are pruned, so the score is 1 minus it.
    """
    format = read_format(checkpoint)
    scores = {}
    for number, layer in enumerate(layout.layers, start=1):
        sums_E3 = np.zeros((layout.num_experts, 3))
        for expert, weights in _weights(checkpoint, layout, layer, format):
            values = weights.float()
            sums_E3[expert] += (
                values.abs().sum(dtype=torch.float64).item(),
                values.square().sum(dtype=torch.float64).item(),
                values.numel(),
            )
        total_E, square_E, count_E = sums_E3.T
        spread_E = np.divide(total_E, np.sqrt(count_E * square_E), out=np.ones_like(total_E), where=square_E > 0)
        scores[layer.index] = 1 - spread_E
        progress("weights", number, len(layout.layers), "layers")
    return Scores(AIMER, scores)


def _weights(
    checkpoint: Checkpoint, layout: MoELayout, layer: MoELayer, format: Format
) -> Iterator[tuple[int, Tensor]]:
    """Every expert's matrices, one at a time; biases left out."""
    for expert, parts in enumerate(layer.experts):
        for info in _matrices(parts.values(), format):
            yield expert, decode(checkpoint, info, format=format)
    for stacked in layer.stacked:
        if stacked.role != "expert":
            continue
        for info in _matrices([stacked.info], format):
            values = decode(checkpoint, info, format=format).movedim(stacked.axis, 0)
            for expert, part in enumerate(values.reshape(stacked.num_entries, -1)[: layout.num_experts]):
                yield expert, part


def _matrices(infos: Iterable[TensorInfo], format: Format) -> Iterator[TensorInfo]:
    for info in infos:
        if not format.is_companion(info.name) and not info.name.endswith("bias") and math.prod(info.shape) > 1:
            yield info
