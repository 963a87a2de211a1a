"""Measured figures: a value with its standard error.

Shape suffixes: D = samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A measured value and its standard error (None where one sample leaves no spread to see)."""

    value: float
    standard_error: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error}


def ratio(sum_D: np.ndarray[Any, Any], tokens_D: np.ndarray[Any, Any]) -> Figure:
    """Sum over tokens, with the standard error of a ratio estimator over samples (Cochran, Sampling Techniques, eq. 6.13).

    value r = sum_D sum / sum_D tokens;  standard error = sqrt(D / (D - 1) * sum_D (sum - r * tokens)^2) / sum_D tokens.
    """
    total = float(tokens_D.sum())
    value = float(sum_D.sum()) / total
    if len(sum_D) < 2:
        return Figure(value, None)
    spread = float(np.square(sum_D - value * tokens_D).sum()) * len(sum_D) / (len(sum_D) - 1)
    return Figure(value, math.sqrt(spread) / total)


def mean(value_D: np.ndarray[Any, Any]) -> Figure:
    """The mean and its standard error: the samples' standard deviation over sqrt(D)."""
    return ratio(np.asarray(value_D, dtype=np.float64), np.ones(len(value_D)))
