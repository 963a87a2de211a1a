"""Sums over routed pairs on the device: what observing adds up while the model runs.

Every micro-batch adds to the running totals, in the order of the calibration. So the result does not depend on how micro-batches are
grouped into waves, nor on where a run was interrupted, to the bit. Nothing waits for the device before a layer's end.

Shape suffixes: N = tokens of a micro-batch laid end to end, P = routed (token, expert) pairs, S = rows of sums, E = experts,
Q = the six sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reapkit.calibration import CalibrationBatch
from reapkit.errors import DataError
from reapkit.experts import RoutedObserver, RoutedPairs
from reapkit.layout import tokens_ahead
from reapkit.statistics import NUM_FOLDS, SUM_NAMES, LayerStatistics

# Greater than any micro-batch x E + expert.
_NONE = torch.iinfo(torch.int64).max


class RoutedSums:
    """The totals of every observed layer; one more row than there are takes what padding was routed to.

    Args:
        begun: by layer, the totals to go on from.
        num_layers: decoder layers; a layer's number from there on is that of an MTP layer.
        device: where the model runs.
        kernels: the fused kernels, where they are used.
    """

    def __init__(
        self,
        begun: Mapping[int, LayerStatistics],
        *,
        num_layers: int,
        device: torch.device,
        kernels: ModuleType | None = None,
    ) -> None:
        self._num_layers = num_layers
        self._device = device
        first = next(iter(begun.values()))
        self._num_rows, self._num_experts = first.count_SE.shape
        self._layers = {index: _LayerSums(totals, device, kernels) for index, totals in begun.items()}

    def observer(self, batch: CalibrationBatch, number: int) -> RoutedObserver:
        """What one micro-batch's forward shows its routed pairs to; `number` is its place in the calibration."""
        row_B = batch.domain_B * NUM_FOLDS + batch.fold_B

        @cache
        def rows(ahead: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
            """The row of every token that has so many behind it, and how many such tokens each row has."""
            length_B = (batch.length_B - ahead).clip(0)
            place_T = np.arange(batch.mask_BT.shape[1])
            row_BT = np.where(place_T < length_B[:, None], row_B[:, None], self._num_rows)
            tokens_S = np.bincount(row_B, weights=length_B, minlength=self._num_rows)
            return torch.from_numpy(row_BT.reshape(-1)).to(self._device), tokens_S

        rows(0)  # in a layer the copy would first wait for all that the device has to do

        def observe(pairs: RoutedPairs) -> None:
            row_N, tokens_S = rows(tokens_ahead(pairs.layer, self._num_layers))
            self._layers[pairs.layer].add(pairs, row_N, tokens_S, number)

        return observe

    def require_finite(self, layer: int) -> None:
        """Raise DataError where anything that was added to a layer is not finite; a layer without experts passes."""
        if layer in self._layers and (place := self._layers[layer].first_not_finite()) is not None:
            number, expert = place
            raise DataError(
                f"layer {layer}, expert {expert}, micro-batch {number}: its output or gate weight is NaN or infinite",
                hint="try --dtype float32; if it stays, the checkpoint's weights are damaged",
            )

    def totals(self) -> dict[int, LayerStatistics]:
        """By layer, everything added so far, padding left out."""
        return {index: layer.totals() for index, layer in self._layers.items()}


class _LayerSums:
    """One layer's totals on the device."""

    def __init__(self, begun: LayerStatistics, device: torch.device, kernels: ModuleType | None) -> None:
        self._kernels = kernels
        self._num_rows, self._num_experts = begun.count_SE.shape
        sums_QSE = torch.zeros(len(SUM_NAMES), self._num_rows + 1, self._num_experts, dtype=torch.float64)
        for sums_SE, name in zip(sums_QSE, SUM_NAMES, strict=True):
            sums_SE[:-1] = torch.from_numpy(getattr(begun, name))
        self._sums_QSE = sums_QSE.to(device)
        # Kept as [S, E] so that padding has a row of its own; what was there before goes to the first one.
        max_SE = torch.zeros(self._num_rows + 1, self._num_experts, dtype=torch.float32)
        max_SE[0] = torch.from_numpy(begun.max_norm_E)
        self._max_SE = max_SE.to(device)
        # Micro-batch x E + expert of the first pair whose gated norm is not finite.
        self._first_bad = torch.full((), _NONE, dtype=torch.int64, device=device)
        self._tokens_S = begun.tokens_S.copy()

    def add(self, pairs: RoutedPairs, row_N: Tensor, tokens_S: np.ndarray[Any, Any], number: int) -> None:
        self._tokens_S += tokens_S
        if self._kernels is not None:
            self._kernels.add_pairs(
                pairs.norm_P, pairs.gate_P, pairs.token_P, pairs.expert_P, row_N, sums_QSE=self._sums_QSE,
                max_SE=self._max_SE, num_rows=self._num_rows, first_bad=self._first_bad, number=number,
            )  # fmt: skip
            return
        row_P = row_N[pairs.token_P]
        place_P = row_P * self._num_experts + pairs.expert_P
        norm_P, gate_P = pairs.norm_P.double(), pairs.gate_P.double()
        gated_P = gate_P * norm_P
        values_QP = torch.stack((torch.ones_like(norm_P), gate_P, norm_P, norm_P.square(), gated_P, gated_P.square()))
        self._sums_QSE.view(len(SUM_NAMES), -1).index_add_(1, place_P, values_QP)
        self._max_SE.view(-1).scatter_reduce_(0, place_P, pairs.norm_P, "amax")
        is_bad_P = (row_P < self._num_rows) & ~gated_P.isfinite()
        bad_P = torch.where(is_bad_P, number * self._num_experts + pairs.expert_P, _NONE)
        self._first_bad = torch.cat((bad_P, self._first_bad.view(1))).min()

    def first_not_finite(self) -> tuple[int, int] | None:
        """Micro-batch and expert of the first pair whose gated norm is NaN or infinite; None where all are finite."""
        first = int(self._first_bad)
        return None if first == _NONE else divmod(first, self._num_experts)

    def totals(self) -> LayerStatistics:
        sums_QSE = self._sums_QSE[:, :-1].cpu().numpy().copy()
        max_E = self._max_SE[:-1].amax(0).double().cpu().numpy()
        return LayerStatistics(
            tokens_S=self._tokens_S.copy(), **dict(zip(SUM_NAMES, sums_QSE, strict=True)), max_norm_E=max_E
        )
