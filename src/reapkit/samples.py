"""What sampled tokens bring to every MoE layer, in a file beside the statistics, from which re-routed errors follow without a device.

One safetensors file of a size known beforehand: rows are written to their places as layers are observed, so that no more than one layer
of one micro-batch is held in memory, an interrupted run goes on in the same file, and several processes can fill one.

Shape suffixes as in `elimination`: T = sampled tokens, C = candidates, U = pairs of candidates, E = experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from reapkit import outputs
from reapkit.elimination import RoutedSample
from reapkit.errors import DataError, OutputError, ReapkitError
from reapkit.layout import Identity
from reapkit.selection import Rule
from reapkit.tensors import (
    MAX_NUMBER,
    TensorInfo,
    as_count,
    as_list,
    as_table,
    as_text,
    encode_header,
    parse_json,
    read_header,
)

FORMAT = "reapkit-routed-sample-1"
SUFFIX = ".safetensors"
_DTYPES = {"U8": np.uint8, "I16": np.int16, "I32": np.int32, "F32": np.float32}


def beside(statistics: Path) -> Path:
    """The sample that belongs to a statistics file."""
    return statistics.with_name(statistics.name.removesuffix(SUFFIX) + ".reroute" + SUFFIX)


@dataclass(frozen=True)
class SampleHeader:
    """What a sample is of.

    Attributes:
        source, settings, digest: as in statistics: the model, what else decides the numbers, and the text.
        seed: of the choice of tokens.
        domains: their names.
        tokens: sampled tokens; candidates: experts per token.
        rules: the router's rule, by layer.
    """

    source: Identity
    settings: Mapping[str, Any]
    digest: str
    seed: int
    domains: tuple[str, ...]
    tokens: int
    candidates: int
    rules: Mapping[int, Rule] = field(repr=False)

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of everything in the file, in its order."""
        tokens, candidates = self.tokens, self.candidates
        listed: list[tuple[str, str, tuple[int, ...]]] = [
            ("domain", "I32", (tokens,)),
            ("fold", "I32", (tokens,)),
            ("share", "F32", (tokens,)),
        ]
        for index, rule in self.rules.items():
            parts: dict[str, tuple[str, tuple[int, ...]]] = {
                "expert": ("I16", (tokens, candidates)),
                "score": ("F32", (tokens, candidates)),
                "gram": ("F32", (tokens, candidates * (candidates + 1) // 2)),
                "stream_sq": ("F32", (tokens,)),
                "turn": ("F32", (tokens,)),
            }
            if rule.num_groups > 1:
                parts["choice"] = ("F32", (tokens, rule.num_experts))
            listed += [(f"layers.{index}.{part}", *described) for part, described in parts.items()]
        return listed

    def encode(self) -> bytes:
        described = {
            "source": vars(self.source),
            "settings": dict(self.settings),
            "digest": self.digest,
            "seed": self.seed,
            "domains": list(self.domains),
            "rules": {str(index): rule.to_json() for index, rule in self.rules.items()},
        }
        return encode_header(self.tensors(), metadata={FORMAT: json.dumps(described, sort_keys=True)})

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        header = self.encode()
        sizes = [int(np.prod(shape)) * np.dtype(_DTYPES[dtype]).itemsize for _, dtype, shape in self.tensors()]
        return len(header) + sum(sizes)


class SampleWriter:
    """A sample file that is being filled, under another name until it is whole.

    Args:
        path: where it will be.
        header: what it holds.

    Raises:
        DataError: an unfinished file of another run is there.
        OutputError: the system refuses.
    """

    def __init__(self, path: Path, header: SampleHeader) -> None:
        self._path, self._partial = path, outputs.unfinished(path)
        encoded = header.encode()
        outputs.require_target(path)
        with outputs.explained(path, hint=outputs.REPEAT):
            if not self._partial.exists() and path.exists() and _begins_with(path, encoded):
                path.rename(self._partial)  # finished, and then the statistics were not
            is_new = not self._partial.exists()
            if not is_new and not _begins_with(self._partial, encoded):
                raise DataError(
                    f"{self._partial} holds the sample of an interrupted run on another model, text or settings",
                    hint="repeat the command that began it, or remove the file",
                )
            self._stream = self._partial.open("w+b" if is_new else "r+b", buffering=0)
            if is_new:
                outputs.write_all(self._stream, encoded)
                self._stream.truncate(header.nbytes)
        self._infos: dict[str, TensorInfo] = read_header(self._partial)[0]

    def write(self, name: str, first: int, rows: NDArray[Any]) -> None:
        """Put rows in their place."""
        info = self._infos[name]
        values = np.ascontiguousarray(rows, dtype=_DTYPES[info.dtype])
        assert values.shape[1:] == info.shape[1:] and first + len(values) <= info.shape[0]
        offset = info.start + first * (info.nbytes // max(info.shape[0], 1))
        with outputs.explained(self._path, hint=outputs.REPEAT):
            view = memoryview(values.tobytes())
            while view:
                count = os.pwrite(self._stream.fileno(), view, offset)
                view, offset = view[count:], offset + count

    def sync(self) -> None:
        """Let what was written last through a power cut."""
        with outputs.explained(self._path, hint=outputs.REPEAT):
            os.fsync(self._stream.fileno())

    def finish(self) -> None:
        """Give the file its name."""
        self.sync()
        with outputs.explained(self._path, hint=outputs.REPEAT):
            self._stream.close()
            self._partial.replace(self._path)
            outputs.sync_folder(self._path.parent)

    def close(self) -> None:
        """Leave the file as it is, to go on with."""
        self._stream.close()


def _begins_with(path: Path, encoded: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(encoded)) == encoded


@dataclass(frozen=True)
class RoutedSamples:
    """A finished sample file, of which one layer is read at a time."""

    path: Path
    header: SampleHeader

    @classmethod
    def open(cls, path: Path) -> RoutedSamples:
        """Read the header.

        Raises:
            DataError: missing, not a sample, or damaged.
        """
        if not path.is_file():
            raise DataError(
                f"there is no sample of tokens {path}", hint="make one with reapkit observe --reroute-tokens 32768"
            )
        try:
            infos, metadata = read_header(path)
            described = parse_json(metadata[FORMAT], origin="its description")
            rules = {int(index): Rule(**as_table(rule)) for index, rule in as_table(described["rules"]).items()}
            tokens, candidates = infos[f"layers.{min(rules)}.expert"].shape
            header = SampleHeader(
                Identity.from_json(described["source"]),
                as_table(described["settings"]),
                as_text(described["digest"]),
                as_count(described["seed"], least=-MAX_NUMBER),
                tuple(map(as_text, as_list(described["domains"]))),
                tokens,
                candidates,
                rules,
            )
            if [(name, info.dtype, info.shape) for name, info in infos.items()] != header.tensors():
                raise ValueError("its tensors are not those of its description")
        except (ReapkitError, OSError, KeyError, TypeError, ValueError) as error:
            reason = error.message if isinstance(error, ReapkitError) else str(error)
            raise DataError(f"{path} is damaged or not a sample of tokens: {reason}", hint="observe again") from None
        return cls(path, header)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.header.rules)

    def layer(self, index: int, *, folds: tuple[int, ...] | None = None) -> RoutedSample:
        """One layer's sample; with `folds` only tokens of documents in these.

        Raises:
            DataError: a number is not finite.
        """
        rule = self.header.rules[index]
        try:
            with safe_open(self.path, "numpy") as file:
                parts = {name: file.get_tensor(name) for name in ("domain", "fold", "share")}
                for part in (
                    "expert",
                    "score",
                    "gram",
                    "stream_sq",
                    "turn",
                    *(("choice",) if rule.num_groups > 1 else ()),
                ):
                    parts[part] = file.get_tensor(f"layers.{index}.{part}")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path} cannot be read: {error}", hint="observe again") from None
        for part, values in parts.items():
            if not np.isfinite(values).all():
                raise DataError(f"layer {index}: the {part} of a sampled token is not finite", hint="observe again")
        # Tokens that a layer does not take (an MTP layer's last ones) left no trace.
        taken_T = parts["stream_sq"] > 0
        if folds is not None:
            taken_T &= np.isin(parts["fold"], folds)
        taken = np.flatnonzero(taken_T)
        return RoutedSample(
            rule,
            parts["expert"][taken],
            parts["score"][taken],
            parts["gram"][taken],
            parts["stream_sq"][taken],
            parts["turn"][taken],
            parts["domain"][taken],
            parts["share"][taken],
            parts["choice"][taken] if "choice" in parts else None,
        )


def require_space(path: Path, header: SampleHeader) -> None:
    """Raise OutputError where the disk has no room for the file, before anything is observed."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    with outputs.explained(path, hint=outputs.REPEAT):
        begun = [
            file for file in (outputs.unfinished(path), path) if file.exists() and _begins_with(file, header.encode())
        ]
    # What is gone on with, unfinished or finished before the statistics were, needs no place again.
    if header.nbytes > free + sum(file.stat().st_blocks * 512 for file in begun[:1]):
        raise OutputError(
            f"the sample of {header.tokens:,} tokens takes {header.nbytes / 1e6:,.1f} MB in {folder}, and {free / 1e6:,.1f} MB are free",
            hint="fewer --reroute-tokens, fewer --reroute-candidates, or another disk",
        )
