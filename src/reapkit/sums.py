"""Sums over routed pairs on the device: what observing adds up while the model runs.

Every micro-batch adds to the running totals, in the order of the calibration. So the result does not depend on how micro-batches are
grouped into waves, nor on where a run was interrupted, to the bit.

Shape suffixes: N = tokens of a micro-batch laid end to end, P = routed (token, expert) pairs, S = rows of sums, E = experts,
Q = the six sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reapkit.calibration import CalibrationBatch
from reapkit.errors import DataError
from reapkit.experts import RoutedObserver, RoutedPairs
from reapkit.statistics import NUM_FOLDS, SUM_NAMES, LayerStatistics


class RoutedSums:
    """The totals of every observed layer; one more row than there are takes what padding was routed to.

    Args:
        begun: by layer, the totals to go on from.
        num_layers: decoder layers; a layer's number from there on is that of an MTP layer.
        device: where the model runs.
    """

    def __init__(self, begun: Mapping[int, LayerStatistics], *, num_layers: int, device: torch.device) -> None:
        self._num_layers = num_layers
        self._device = device
        first = next(iter(begun.values()))
        self._num_rows, self._num_experts = first.count_SE.shape
        self._layers = {index: _LayerSums(totals, device) for index, totals in begun.items()}

    def observer(self, batch: CalibrationBatch) -> RoutedObserver:
        """What one micro-batch's forward shows its routed pairs to."""
        row_B = batch.domain_B * NUM_FOLDS + batch.fold_B

        @cache
        def rows(ahead: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
            """The row of every token that has so many behind it, and how many such tokens each row has."""
            length_B = (batch.length_B - ahead).clip(0)
            place_T = np.arange(batch.mask_BT.shape[1])
            row_BT = np.where(place_T < length_B[:, None], row_B[:, None], self._num_rows)
            tokens_S = np.bincount(row_B, weights=length_B, minlength=self._num_rows)
            return torch.from_numpy(row_BT.reshape(-1)).to(self._device), tokens_S

        def observe(pairs: RoutedPairs) -> None:
            # An MTP layer takes the next token, which the last ones of a document do not have.
            row_N, tokens_S = rows(max(0, pairs.layer - self._num_layers + 1))
            self._layers[pairs.layer].add(pairs, row_N, tokens_S)

        return observe

    def require_finite(self, layer: int, number: int) -> None:
        """Raise DataError where what a micro-batch added to a layer is not finite.

        Args:
            layer: the layer; one without experts passes.
            number: the micro-batch's place in the calibration, for the message.
        """
        if layer in self._layers and (expert := self._layers[layer].first_not_finite()) is not None:
            raise DataError(
                f"layer {layer}, expert {expert}, micro-batch {number}: its output or gate weight is NaN or infinite",
                hint="try --dtype float32; if it stays, the checkpoint's weights are damaged",
            )

    def totals(self) -> dict[int, LayerStatistics]:
        """By layer, everything added so far, padding left out."""
        return {index: layer.totals() for index, layer in self._layers.items()}


class _LayerSums:
    """One layer's totals on the device."""

    def __init__(self, begun: LayerStatistics, device: torch.device) -> None:
        self._num_rows, self._num_experts = begun.count_SE.shape
        shape = (len(SUM_NAMES), self._num_rows + 1, self._num_experts)
        sums_QSE = torch.zeros(shape, dtype=torch.float64)
        for sums_SE, name in zip(sums_QSE, SUM_NAMES, strict=True):
            sums_SE[:-1] = torch.from_numpy(getattr(begun, name))
        self._sums_QSE = sums_QSE.view(len(SUM_NAMES), -1).to(device)
        # Kept as [S, E] so that padding has a row of its own; what was there before goes to the first one.
        max_SE = torch.zeros(self._num_rows + 1, self._num_experts, dtype=torch.float32)
        max_SE[0] = torch.from_numpy(begun.max_norm_E)
        self._max_SE = max_SE.view(-1).to(device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._tokens_S = begun.tokens_S.copy()

    def add(self, pairs: RoutedPairs, row_N: Tensor, tokens_S: np.ndarray[Any, Any]) -> None:
        row_P = row_N[pairs.token_P]
        place_P = row_P * self._num_experts + pairs.expert_P
        norm_P, gate_P = pairs.norm_P.double(), pairs.gate_P.double()
        gated_P = gate_P * norm_P
        values_QP = torch.stack((torch.ones_like(norm_P), gate_P, norm_P, norm_P.square(), gated_P, gated_P.square()))
        self._sums_QSE.index_add_(1, place_P, values_QP)
        self._max_SE.scatter_reduce_(0, place_P, pairs.norm_P, "amax")
        self._finite &= torch.isfinite(torch.where(row_P < self._num_rows, gated_P, 0.0)).all()
        self._tokens_S += tokens_S

    def first_not_finite(self) -> int | None:
        """The first expert with a sum that is NaN or infinite; None where all are finite."""
        if bool(self._finite):
            return None
        is_finite_QSE = torch.isfinite(self._sums_QSE.view(len(SUM_NAMES), -1, self._num_experts)[:, :-1])
        return int((~is_finite_QSE).any(0).any(0).nonzero()[0])

    def totals(self) -> LayerStatistics:
        sums_QSE = self._sums_QSE.view(len(SUM_NAMES), -1, self._num_experts)[:, :-1].cpu().numpy().copy()
        max_E = self._max_SE.view(-1, self._num_experts)[:-1].amax(0).double().cpu().numpy()
        return LayerStatistics(
            tokens_S=self._tokens_S.copy(), **dict(zip(SUM_NAMES, sums_QSE, strict=True)), max_norm_E=max_E
        )
