"""What observing leaves behind: additive sums per layer and expert, from which every criterion is a pure function.

Shape suffixes: S = rows of sums, one per (domain, fold), row = domain * NUM_FOLDS + fold; E = experts.
Sums over shards of the calibration, over devices and over domains simply add; the folds are there to ask how far a choice of experts
would have differed on other calibration text of the same kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as encode

from reapkit import hub, outputs
from reapkit.checkpoint import exists
from reapkit.errors import CheckpointError, DataError, PlanError, ReapkitError
from reapkit.layout import Identity
from reapkit.tensors import (
    MAX_NUMBER,
    as_count,
    as_list,
    as_table,
    as_text,
    brief,
    name_by_layer,
    parse_json,
    read_header,
    split_by_layer,
)

Array = NDArray[np.float64]

NUM_FOLDS = (
    4  # fold = document number mod 4: halves can be formed in three ways, and a fold still has a quarter of the text
)
FORMAT = "reapkit-statistics-1"
SUM_NAMES = ("count_SE", "gate_SE", "norm_SE", "norm_sq_SE", "gated_norm_SE", "gated_norm_sq_SE")


@dataclass
class LayerStatistics:
    """Sums over the tokens that one MoE layer routed to each expert. g is the coefficient and f the output of an expert for a token.

    Attributes:
        tokens_S: tokens that passed the layer.
        count_SE: tokens routed to the expert.
        gate_SE: sum of g.
        norm_SE, norm_sq_SE: sums of ‖f‖₂ and of its square.
        gated_norm_SE, gated_norm_sq_SE: sums of g‖f‖₂ and of its square.
        max_norm_E: the largest ‖f‖₂ seen.
    """

    tokens_S: Array
    count_SE: Array
    gate_SE: Array
    norm_SE: Array
    norm_sq_SE: Array
    gated_norm_SE: Array
    gated_norm_sq_SE: Array
    max_norm_E: Array

    @classmethod
    def zeros(cls, num_rows: int, num_experts: int) -> LayerStatistics:
        sums = {name: np.zeros((num_rows, num_experts)) for name in SUM_NAMES}
        return cls(tokens_S=np.zeros(num_rows), max_norm_E=np.zeros(num_experts), **sums)

    def add(self, other: LayerStatistics, *, rows: Sequence[int] | None = None) -> None:
        """Add another's sums, its row i to the row rows[i] of this one (to row i by default)."""
        at = slice(None) if rows is None else np.asarray(rows)
        for name in ("tokens_S", *SUM_NAMES):
            getattr(self, name)[at] += getattr(other, name)
        np.maximum(self.max_norm_E, other.max_norm_E, out=self.max_norm_E)

    def require_finite(self, layer: int) -> None:
        """Raise DataError naming layer and expert where a sum is NaN or infinite."""
        if not np.isfinite(self.tokens_S).all():
            raise DataError(f"layer {layer}: the number of tokens is not finite")
        for name in (*SUM_NAMES, "max_norm_E"):
            values = getattr(self, name)
            if not np.isfinite(values).all():
                expert = int(np.argwhere(~np.isfinite(values))[0][-1])
                raise DataError(f"layer {layer}, expert {expert}: the sum {name} is not finite")


_PARTS = tuple(part.name for part in fields(LayerStatistics))


@dataclass(frozen=True)
class CalibrationRecord:
    """One observed body of text: what must agree, or differ, for sums to be added.

    Attributes:
        digest: SHA-256 over tokens, document borders and domains.
        tokens: number of tokens.
        seed: of the choice of samples.
        sources: what was read, for people.
    """

    digest: str
    tokens: int
    seed: int = 0
    sources: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def from_json(cls, value: Any) -> CalibrationRecord:
        """Read from a file; KeyError or ValueError if it is none."""
        entries = as_table(value)
        sources = tuple(map(as_table, as_list(entries["sources"])))
        return cls(
            as_text(entries["digest"]),
            as_count(entries["tokens"]),
            as_count(entries["seed"], least=-MAX_NUMBER),
            sources,
        )


@dataclass(frozen=True)
class Statistics:
    """The sums of every MoE layer, with what they were measured on.

    Attributes:
        source: the observed checkpoint.
        num_experts, top_k, num_groups: the observed model's routing.
        domains: names of the domains, in the order of the rows.
        settings: what else decides the numbers (dtype, maximum length, tokenizer and chat template).
        calibration: the observed texts.
        unobserved: numbers of the layers with experts that lie on disk and that the model never runs (MTP layers).
        layers: sums by layer number.
        batches, finished_batches: of a run that is not done, its micro-batches, and those whose sums are here; 0 in whole statistics.
    """

    source: Identity
    num_experts: int
    top_k: int
    num_groups: int
    domains: tuple[str, ...]
    settings: Mapping[str, Any]
    calibration: tuple[CalibrationRecord, ...]
    unobserved: tuple[int, ...]
    layers: Mapping[int, LayerStatistics] = field(repr=False)
    batches: int = 0
    finished_batches: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(record.tokens for record in self.calibration)

    def save(self, path: Path) -> None:
        """Write to one safetensors file; it appears under its name only when it is whole.

        Raises:
            OutputError: the system refuses.
        """
        described = {
            part.name: getattr(self, part.name) for part in fields(self) if part.name not in ("layers", "calibration")
        }
        described["source"] = vars(self.source)
        described["calibration"] = [vars(record) for record in self.calibration]
        # One entry: the library writes several in an order that changes from run to run.
        metadata = {FORMAT: json.dumps(described, sort_keys=True)}
        outputs.save(path, encode(name_by_layer(self.layers, _PARTS), metadata=metadata))

    @classmethod
    def load(cls, path: Path, *, unfinished: bool = False) -> Statistics:
        """Read what `save` wrote; with `unfinished` also the sums of a run that was interrupted.

        Raises:
            DataError: not a statistics file, a damaged one, or an interrupted run's.
        """
        if not path.is_file():
            raise DataError(f"there is no statistics file {path}", hint="make one with reapkit observe")
        try:
            _, metadata = read_header(path)
        except ReapkitError as error:
            raise DataError(
                f"{path} is damaged or not a statistics file: {error.message}", hint="observe again"
            ) from None
        if FORMAT not in metadata:
            raise DataError(f"{path} is not a statistics file of reapkit", hint="make one with reapkit observe")
        try:
            described = parse_json(metadata[FORMAT], origin="its description")
            arrays = split_by_layer(load_file(path), _PARTS)
            layers = {index: LayerStatistics(**parts) for index, parts in arrays.items()}
            result = cls(
                source=Identity.from_json(described.pop("source")),
                calibration=tuple(map(CalibrationRecord.from_json, as_list(described.pop("calibration")))),
                domains=tuple(map(as_text, as_list(described.pop("domains")))),
                unobserved=tuple(map(as_count, as_list(described.pop("unobserved")))),
                settings=as_table(described.pop("settings")),
                layers=layers,
                **{name: as_count(described.pop(name), least=1) for name in ("num_experts", "top_k", "num_groups")},
                **{name: as_count(described.pop(name)) for name in ("batches", "finished_batches")},
            )
            if described:
                raise ValueError(f"the entry {brief(next(iter(described)))} is unknown")
            if len(set(result.domains)) < len(result.domains):
                raise ValueError("a domain is listed twice")
            if result.num_experts % result.num_groups:
                raise ValueError(f"{result.num_experts} experts do not divide into {result.num_groups} groups")
            rows, experts = len(result.domains) * NUM_FOLDS, result.num_experts
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SUM_NAMES, (rows, experts))
            shapes |= {"tokens_S": (rows,), "max_norm_E": (experts,)}
            for index, layer in layers.items():
                for name, shape in shapes.items():
                    values = getattr(layer, name)
                    if values.shape != shape or values.dtype != np.float64:
                        raise ValueError(f"{name} of layer {index} is {values.dtype} {list(values.shape)}, "
                                         f"not float64 {list(shape)}")  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError, OSError, SafetensorError, CheckpointError) as error:
            raise DataError(f"{path} is damaged: {error}", hint="observe again") from None
        for index, layer in layers.items():
            layer.require_finite(index)
        if result.batches and not unfinished:
            raise DataError(
                f"{path} holds the sums of an interrupted run: {result.finished_batches:,} of {result.batches:,} micro-batches",
                hint="repeat the command that wrote it: it goes on from there",
            )
        return result


def differing(
    source: Identity, settings: Mapping[str, Any], other_source: Identity, other_settings: Mapping[str, Any]
) -> str | None:
    """What tells two observations apart, whatever the text: the model, or the name of a setting; None where nothing does."""
    if (what := source.differing(other_source)) is not None:
        return what
    names = sorted(settings.keys() | other_settings.keys())
    return next((name for name in names if settings.get(name) != other_settings.get(name)), None)


def begun_at(path: Path, source: str | Path) -> str | None:
    """The commit that the statistics in a file are of, whole or an interrupted run's, if they are of this repository on the hub.

    A branch may have moved since, and the same command, repeated, goes on with what it began with.

    Raises:
        DataError: the file is not one of statistics.
    """
    name, stated = hub.parse(str(source))
    if stated is not None or not path.exists() or exists(Path(source)):
        return None
    begun = Statistics.load(path, unfinished=True).source
    return begun.revision if begun.origin == name else None


def combine(parts: Sequence[Statistics]) -> Statistics:
    """The sums of several runs over different text, as if they had been one.

    Raises:
        PlanError: the runs observed different models or settings, or the same text twice.
    """
    first = parts[0]
    for part in parts[1:]:
        if (what := differing(first.source, first.settings, part.source, part.settings)) is not None:
            values = (
                f" ({first.settings.get(what)} and {part.settings.get(what)})"
                if what in ("dtype", "max_length")
                else ""
            )
            raise PlanError(f"statistics of different {what}{values} do not add up")
        if part.layers.keys() != first.layers.keys():
            raise PlanError("statistics of different layers do not add up")
    records = [record for part in parts for record in part.calibration]
    digests = [record.digest for record in records]
    if len(set(digests)) < len(digests):
        twice = next(digest for digest in digests if digests.count(digest) > 1)
        raise PlanError(f"the calibration text {twice[:12]} is in more than one of the files and would count twice")

    domains = tuple(sorted({domain for part in parts for domain in part.domains}))
    layers = {index: LayerStatistics.zeros(len(domains) * NUM_FOLDS, first.num_experts) for index in first.layers}
    for part in parts:
        rows = [domains.index(domain) * NUM_FOLDS + fold for domain in part.domains for fold in range(NUM_FOLDS)]
        for index, layer in part.layers.items():
            layers[index].add(layer, rows=rows)
    described = {
        name: getattr(first, name)
        for name in (
            "source",
            "num_experts",
            "top_k",
            "num_groups",
            "settings",
            "unobserved",
        )
    }
    return Statistics(**described, domains=domains, calibration=tuple(records), layers=layers)
