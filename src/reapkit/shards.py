"""Writing a checkpoint so that a killed run never looks finished and a repeated one goes on.

Every file appears under its name only when it is whole and on the disk. The folder holds a marker from the first byte on; the marker
goes last, after the index, the config, the sidecars and the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

from reapkit import edits
from reapkit.checkpoint import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, UNFINISHED_NAME, Checkpoint
from reapkit.edits import Copy, OutputTensor, Take
from reapkit.errors import CheckpointError, OutputError
from reapkit.layout import MoELayout
from reapkit.plans import PlannedSource, PruningPlan
from reapkit.progress import Progress, silent
from reapkit.tensors import encode_header, nbytes, parse_json

FORMAT = "reapkit-manifest-1"
OWN_FOLDER = "reapkit"
PLAN_NAME = f"{OWN_FOLDER}/plan.json"
_PARTIAL = ".partial"
# transformers and vLLM both expect this entry in every shard.
_METADATA = {"format": "pt"}
# Large enough that calls cost nothing, small enough that progress moves and an interrupt is heard on a slow disk.
_CHUNK_BYTES = 16 << 20
# copy_file_range is refused between these kinds of files; plain reads and writes still work. Erring on the long side is safe: a real
# failure comes back from the plain copy.
_NO_RANGE_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Size:
    """How large a checkpoint is: experts per layer, parameters (None where the format hides them), bytes of its tensors."""

    num_experts: int
    parameters: int | None
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What an output says about itself in `reapkit.json`.

    Attributes:
        source: the checkpoint that it was cut from, with its fingerprints.
        base_model: the model to credit on the card, where the source is itself a derivative or a local copy.
        criterion, seed, calibration: how the experts were chosen, as the plan says.
        before, after: sizes.
        kept: by layer, the kept experts' original numbers; the position in the list is the new number.
        dequantized: whether quantised weights became bf16.
        routers: tensors that decide the routing: to be left alone by whoever quantises afresh.
        plan: SHA-256 of the plan.
        versions: of the packages that decide the bytes.
        details: what the caller wants recorded.
        digests: SHA-256 by file name, recorded by the first verification that succeeds; None before.
    """

    source: PlannedSource
    base_model: str | None
    criterion: str
    seed: int | None
    calibration: tuple[str, ...]
    before: Size
    after: Size
    kept: Mapping[int, tuple[int, ...]]
    dequantized: bool
    routers: tuple[str, ...]
    plan: str
    versions: Mapping[str, str]
    details: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] | None = None

    def save(self, out: Path) -> None:
        """Write `reapkit.json`, layers on a line each."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        # Only lists of numbers: a line break never stands inside a JSON string.
        text = re.sub(r"\[\n\s+([\d,\s]+?)\n\s+\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)
        write_file(out / MANIFEST_NAME, (text + "\n").encode())

    @classmethod
    def load(cls, out: Path) -> Manifest:
        """Read what `save` wrote.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = out / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{out} has no {MANIFEST_NAME}, so it is not an output of reapkit", hint="give the folder that reapkit prune wrote"
            )
        described = parse_json(path.read_bytes(), origin=MANIFEST_NAME)
        if described.pop("format", None) != FORMAT:
            raise CheckpointError(f"{MANIFEST_NAME} in {out} is not in the format {FORMAT}")
        try:
            kept = {int(layer): tuple(experts) for layer, experts in described.pop("kept").items()}
            return cls(
                source=PlannedSource(**described.pop("source")),
                before=Size(**described.pop("before")),
                after=Size(**described.pop("after")),
                calibration=tuple(described.pop("calibration")),
                routers=tuple(described.pop("routers")),
                kept=kept,
                **described,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{MANIFEST_NAME} in {out} is damaged: {type(error).__name__} {error}", hint="prune again"
            ) from None


def write(
    checkpoint: Checkpoint,
    layout: MoELayout,
    plan: PruningPlan,
    out: Path,
    *,
    dequantize: bool = False,
    base_model: str | None = None,
    progress: Progress | None = None,
    details: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the pruned checkpoint to a new folder, or go on where the same command was interrupted.

    Memory stays small whatever the size: byte ranges are copied by the kernel where it can.

    Raises:
        PlanError: the plan is for another model.
        OutputError: the folder is in use, inside the source, or cannot be written.
    """
    routing = checkpoint.fingerprint(layout.router_names)
    plan.require_fits(layout, layout_fingerprint=checkpoint.layout_fingerprint, routing_fingerprint=routing)
    shards = edits.outputs(checkpoint, layout, plan, dequantize=dequantize)
    config = edits.edit_config(checkpoint.config, layout, plan.num_kept, dequantize=dequantize)
    manifest = _describe(
        checkpoint, layout, plan, shards, routing=routing, dequantize=dequantize, base_model=base_model, details=details or {}
    )
    index = {
        "metadata": {"total_size": manifest.after.bytes},
        "weight_map": dict(sorted((tensor.name, file) for file, tensors in shards.items() for tensor in tensors)),
    }
    files = {
        INDEX_NAME: (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode(),
        CONFIG_NAME: edits.config_text(checkpoint, config, layout.architecture.num_experts_keys),
    }
    refuse_folder(checkpoint, out)
    command = _identity(checkpoint, manifest)
    with _explained(out), _claimed(out, command, {*shards, *files, *checkpoint.sidecars, MANIFEST_NAME}):
        _write_shards(checkpoint, shards, out, progress or silent)
        for name, content in files.items():
            write_file(out / name, content)
        for name in checkpoint.sidecars:
            _copy_sidecar(checkpoint, name, out)
        plan.save(out / PLAN_NAME)
        manifest.save(out)
    return manifest


def _describe(
    checkpoint: Checkpoint,
    layout: MoELayout,
    plan: PruningPlan,
    shards: Mapping[str, list[OutputTensor]],
    *,
    routing: str,
    dequantize: bool,
    base_model: str | None,
    details: Mapping[str, Any],
) -> Manifest:
    tensors = [tensor for tensors in shards.values() for tensor in tensors]
    # Counted by the source's description of the output's shapes: a scale is left out whether it is still there or not.
    left = [tensor.info for tensor in tensors]
    parameters = edits.num_parameters(checkpoint.config, checkpoint.tensors.values())
    removed = None if parameters is None else edits.num_parameters(checkpoint.config, left)
    taken = sum(tensor.info.num_elements - _num_elements(tensor) for tensor in tensors)
    return Manifest(
        source=PlannedSource(checkpoint.origin, checkpoint.revision, checkpoint.layout_fingerprint, routing),
        base_model=base_model,
        criterion=plan.criterion,
        seed=plan.seed,
        calibration=plan.calibration,
        before=Size(layout.num_experts, parameters, checkpoint.nbytes),
        after=Size(
            plan.num_kept,
            None if removed is None else removed - taken,
            sum(nbytes(tensor.dtype, tensor.shape) for tensor in tensors),
        ),
        kept=plan.kept,
        dequantized=dequantize,
        routers=layout.router_names,
        plan=hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest(),
        versions={"reapkit": version("reapkit")},
        details=details,
    )
