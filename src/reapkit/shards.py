"""Writing a checkpoint so that a killed run never looks finished and a repeated one goes on.

Every file appears under its name only when it is whole and on the disk. The folder holds a marker from the first byte on; the marker
goes last, after the index, the config, the sidecars and the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from threading import Event, Lock
from typing import Any

from reapkit import cards, edits, landing
from reapkit.cards import Subject
from reapkit.checkpoint import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    UNFINISHED_NAME,
    Checkpoint,
    read_small,
    walk,
)
from reapkit.clusters import Merging
from reapkit.edits import Copy, Orders, OutputTensor, Take
from reapkit.errors import CheckpointError, OutputError, UnsupportedError, UsageError, redacted
from reapkit.interrupts import deferred, is_asked_to_stop, safe_point
from reapkit.landing import Transfer
from reapkit.layout import Identity, MoELayout
from reapkit.outputs import PARTIAL, alone, appearing, explained, make_folder, sync_folder, write_all, write_file
from reapkit.pagecache import Direct, Readers, shorter
from reapkit.plans import PruningPlan
from reapkit.progress import Progress, silent
from reapkit.quantization import read_format
from reapkit.tensors import (
    MAX_NUMBER,
    TensorInfo,
    as_count,
    as_flag,
    as_list,
    as_table,
    as_text,
    brief,
    encode_header,
    parse_json,
    read_layers,
    reading,
)

FORMAT = "reapkit-manifest-1"
OWN_FOLDER = "reapkit"
PLAN_NAME = f"{OWN_FOLDER}/plan.json"
LANDED = f"{OWN_FOLDER}/landed"
LOCK_NAME = f"{OWN_FOLDER}/lock"
RESUMED = "once that is cured, repeat the command: it goes on where it stopped"
# Of all files that are written at once one computes: a tensor of all experts is as large as a layer.
_computing = Lock()
# More files at once copy faster from a cache or an SSD; a disk that turns would rather have fewer.
_FILES_AT_ONCE = 4
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

    @classmethod
    def from_json(cls, value: Any) -> Size:
        """Read from a file; KeyError, TypeError or ValueError if it is not what `asdict` gives."""
        entries = as_table(value)
        known = {name: as_count(entry) for name, entry in entries.items() if name != "parameters"}
        parameters = entries["parameters"]
        return cls(parameters=None if parameters is None else as_count(parameters), **known)


@dataclass(frozen=True)
class Manifest:
    """What an output says about itself in `reapkit.json`.

    Attributes:
        source: the checkpoint that it was cut from, with its fingerprints.
        base_model: the model to credit on the card, where the source is itself a derivative or a local copy.
        criterion, seed, calibration: how the experts were chosen, as the plan says.
        before, after: sizes.
        kept: by layer, the kept experts' original numbers; the position in the list is the new number.
        unmeasured: MTP layers, with the layer whose kept set each of them took.
        drop_mtp: whether the MTP layers were removed.
        observed_layout: the layout's fingerprint of the checkpoint that the plan was made from: the source's own, or that of a sibling
            in another format with the same routers.
        dequantized: whether quantised weights became bf16.
        merging: which experts were averaged into the kept ones, and how; None for a pruned checkpoint.
        routers: tensors that decide the routing: to be left alone by whoever quantises afresh.
        plan: SHA-256 of the plan.
        versions: of the packages that decide the bytes.
        digests: SHA-256 by file name, recorded by the first verification that succeeds; None before.
    """

    source: Identity
    base_model: str | None
    criterion: str
    seed: int | None
    calibration: tuple[str, ...]
    before: Size
    after: Size
    kept: Mapping[int, tuple[int, ...]]
    unmeasured: Mapping[int, int]
    drop_mtp: bool
    observed_layout: str
    dequantized: bool
    routers: tuple[str, ...]
    plan: str
    versions: Mapping[str, str]
    digests: Mapping[str, str] | None = None
    merging: Merging | None = None

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
                f"{out} has no {MANIFEST_NAME}, so it is not an output of reapkit",
                hint="give the folder that reapkit prune wrote",
            )
        described = parse_json(read_small(out, MANIFEST_NAME), origin=MANIFEST_NAME)
        if described.pop("format", None) != FORMAT:
            raise CheckpointError(f"{MANIFEST_NAME} in {out} is not in the format {FORMAT}")
        try:
            digests, seed, base_model, merging = (
                described.pop(name) for name in ("digests", "seed", "base_model", "merging")
            )
            result = cls(
                source=Identity.from_json(described.pop("source")),
                base_model=None if base_model is None else as_text(base_model),
                criterion=as_text(described.pop("criterion")),
                seed=None if seed is None else as_count(seed, least=-MAX_NUMBER),
                calibration=tuple(map(as_text, as_list(described.pop("calibration")))),
                before=Size.from_json(described.pop("before")),
                after=Size.from_json(described.pop("after")),
                kept={
                    layer: tuple(map(as_count, as_list(experts)))
                    for layer, experts in read_layers(described.pop("kept"))
                },
                unmeasured={layer: as_count(like) for layer, like in read_layers(described.pop("unmeasured"))},
                drop_mtp=as_flag(described.pop("drop_mtp")),
                observed_layout=as_text(described.pop("observed_layout")),
                dequantized=as_flag(described.pop("dequantized")),
                routers=tuple(map(as_text, as_list(described.pop("routers")))),
                plan=as_text(described.pop("plan")),
                versions=_texts(described.pop("versions")),
                digests=None if digests is None else _texts(digests),
                merging=None if merging is None else Merging.from_json(merging),
            )
            if described:
                raise ValueError(f"the entry {brief(next(iter(described)))} is unknown")
            result._require_groups()
            return result
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{MANIFEST_NAME} in {out} is damaged: {type(error).__name__} {error}", hint="prune again"
            ) from None

    def _require_groups(self) -> None:
        """Raise ValueError unless every measured layer's groups hold all experts, around the kept ones."""
        if self.merging is None:
            return
        groups, measured = self.merging.groups, self.kept.keys() - self.unmeasured.keys()
        if groups.keys() != measured:
            raise ValueError(f"it chose in the layers {sorted(measured)} and merged in {sorted(groups)}")
        for layer, held in groups.items():
            if sum(len(group.members) for group in held) != self.before.num_experts:
                raise ValueError(f"the groups of layer {layer} do not hold {self.before.num_experts} experts")
            if self.kept[layer] != tuple(group.centre for group in held):
                raise ValueError(f"the groups of layer {layer} are not those of the kept experts")


def _texts(value: Any) -> dict[str, str]:
    return {name: as_text(text) for name, text in as_table(value).items()}


def write(
    checkpoint: Checkpoint,
    layout: MoELayout,
    plan: PruningPlan,
    out: Path,
    *,
    dequantize: bool = False,
    base_model: str | None = None,
    mtp: str | None = None,
    allow_missing_scales: bool = False,
    merging: Merging | None = None,
    orders: Orders | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the pruned checkpoint to a new folder, or go on where the same command was interrupted; with `dry_run`, only describe it.

    With `merging`, the kept experts are averages of its groups, their neurons in `orders`.
    What the same command has finished is left as it is.

    Memory stays small whatever the size: byte ranges are copied by the kernel where it can.

    Raises:
        PlanError: the plan is for another model.
        OutputError: the folder is in use, inside the source, or cannot be written.
    """
    if base_model is not None and redacted(base_model) != base_model:
        raise UsageError("--base-model holds a token or a password", hint="give a hub id like ORG/NAME")
    source = Identity.of(checkpoint, layout)
    plan = plan.for_layout(layout, mtp)
    plan.require_fits(layout, source)
    if plan.drop_mtp and layout.mtp_indices and not layout.architecture.mtp_keys:
        raise UnsupportedError(
            f"which key of {CONFIG_NAME} counts the MTP layers of {layout.architecture.name} is not known, so they cannot be dropped",
            hint="--mtp same-as-last keeps them",
        )
    if not allow_missing_scales:
        require_scales(layout, plan.kept)
    shards = edits.outputs(checkpoint, layout, plan, dequantize=dequantize, merging=merging, orders=orders)
    config = edits.edit_config(checkpoint, layout, plan.kept, drop_mtp=plan.drop_mtp, dequantize=dequantize)
    sidecars = edits.edit_sidecars(checkpoint, layout, plan.kept, dequantize=dequantize)
    copied = [name for name in checkpoint.sidecars if name not in sidecars]
    manifest = _describe(
        checkpoint,
        layout,
        plan,
        shards,
        source=source,
        dequantize=dequantize,
        base_model=base_model,
        merging=merging,
    )
    index = {
        "metadata": {"total_size": manifest.after.bytes},
        "weight_map": dict(sorted((tensor.name, file) for file, tensors in shards.items() for tensor in tensors)),
    }
    files = {
        INDEX_NAME: (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode(),
        CONFIG_NAME: edits.config_text(checkpoint, config),
        **{name: content for name, content in sidecars.items() if content is not None},
    }
    if (done := finished(out)) is not None and replace(done, digests=None) == manifest:
        if (out / LOCK_NAME).exists() and not dry_run:
            with alone(out, out / LOCK_NAME):  # a run that was killed right after its end left it
                pass
        return done
    refuse_folder(checkpoint, out)
    if dry_run:
        # What an interrupted run has written already needs no space any more.
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        _require_space(checkpoint, out, manifest.after.bytes - written)
        return manifest
    command = json.loads(json.dumps(_identity(checkpoint, manifest)))  # as it is read back
    tensors = {
        tensor.name: TensorInfo(tensor.name, tensor.dtype, tensor.shape, file, 0, tensor.nbytes)
        for file, held in shards.items()
        for tensor in held
    }
    described = replace(checkpoint, config=config, tensors=tensors)
    known = manifest.after.parameters is not None
    files[CARD_NAME] = cards.compose(
        Subject(checkpoint, layout, plan, described, known, dequantize, base_model, merging)
    )
    with explained(out, hint=RESUMED), _claimed(out, command, {*shards, *files, *copied, MANIFEST_NAME}):
        _write_shards(checkpoint, shards, out, progress or silent)
        for name, content in files.items():
            write_file(out / name, content)
        for name in copied:
            _copy_sidecar(checkpoint, name, out)
        plan.save(out / PLAN_NAME)
        manifest.save(out)
    return manifest


def transfer(
    checkpoint: Checkpoint, layout: MoELayout, plan: PruningPlan, *, dequantize: bool = False, mtp: str | None = None
) -> Transfer:
    """What `write` would move through the network; nothing from a folder."""
    plan = plan.for_layout(layout, mtp)
    return landing.transfer(checkpoint, edits.outputs(checkpoint, layout, plan, dequantize=dequantize))


def finished(out: Path) -> Manifest | None:
    """The manifest of a finished output, None for any other folder."""
    with explained(out, hint=RESUMED):
        is_finished = (out / MANIFEST_NAME).is_file() and not (out / UNFINISHED_NAME).exists()
    return Manifest.load(out) if is_finished else None


def require_scales(layout: MoELayout, kept: Mapping[int, Iterable[int]]) -> None:
    """Raise CheckpointError where a kept expert lacks a scale that others have: vLLM would take whatever lies in memory for it."""
    missing = [
        f"layer {layer.index}, expert {expert}: {', '.join(rest.lstrip('.') for rest in layer.incomplete[expert])}"
        for layer in layout.layers
        for expert in kept.get(layer.index, ())
        if expert in layer.incomplete
    ]
    if missing:
        raise CheckpointError(
            f"{len(missing)} kept experts lack scales that other experts have: {'; '.join(missing)}",
            hint="fetch the checkpoint again, keep other experts, or go on without with --allow-missing-scales",
        )


def _describe(
    checkpoint: Checkpoint,
    layout: MoELayout,
    plan: PruningPlan,
    shards: Mapping[str, list[OutputTensor]],
    *,
    source: Identity,
    dequantize: bool,
    base_model: str | None,
    merging: Merging | None,
) -> Manifest:
    tensors = [tensor for tensors in shards.values() for tensor in tensors]
    form = read_format(checkpoint)
    return Manifest(
        source=source,
        base_model=base_model,
        criterion=plan.criterion,
        seed=plan.seed,
        calibration=plan.calibration,
        before=Size(layout.num_experts, edits.num_parameters(form, checkpoint.tensors.values()), checkpoint.nbytes),
        after=Size(
            plan.num_kept,
            edits.num_parameters(form, tensors),
            sum(tensor.nbytes for tensor in tensors),
        ),
        kept=plan.kept,
        unmeasured=plan.unmeasured,
        drop_mtp=plan.drop_mtp,
        observed_layout=plan.source.layout,
        dequantized=dequantize,
        routers=tuple(name for name in layout.router_names if not (plan.drop_mtp and layout.is_mtp(name))),
        plan=hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest(),
        versions={name: version(name) for name in ("reapkit", *(("torch",) if dequantize or merging else ()))},
        merging=merging,
    )


def _identity(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    """What must agree for an interrupted run to go on: nothing of it stays in the finished folder.

    Fingerprints do not see the experts' bytes, and fine-tuning often leaves routers as they were, so the shards' place, size and time
    count too.
    """
    source = checkpoint.source
    return {
        "source": asdict(manifest.source),
        "folder": str(checkpoint.path.resolve()) if checkpoint.remote is None else checkpoint.origin,
        "shards": {file: list(source.stamp(file)) for file in checkpoint.files},
        "plan": manifest.plan,
        "dequantize": manifest.dequantized,
        "merging": asdict(manifest)["merging"],
        "base_model": manifest.base_model,
        "versions": dict(manifest.versions),
    }


def refuse_folder(checkpoint: Checkpoint, out: Path) -> None:
    """Raise OutputError unless the output folder is new, empty (but for reapkit's own folder) or an interrupted run's, and apart from the
    source.
    """
    with explained(out, hint=RESUMED):
        source, target = checkpoint.path.resolve(), out.resolve()
        if target == source:
            raise OutputError(f"the output {out} is the source itself", hint="give another folder")
        if target.is_relative_to(source):
            raise OutputError(
                f"the output {out} is inside the source {checkpoint.path}", hint="give a folder outside it"
            )
        if out.exists() and not out.is_dir():
            raise OutputError(f"the output {out} is a file", hint="give a new folder")
        if (out / OWN_FOLDER).is_symlink():
            raise OutputError(
                f"the output folder {out} holds the link {OWN_FOLDER}", hint="remove it, or give a new folder"
            )
        if not out.exists() or (out / UNFINISHED_NAME).exists():
            return
        found = sorted(
            entry.name for entry in out.iterdir() if entry.name not in (OWN_FOLDER, UNFINISHED_NAME + PARTIAL)
        )
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise OutputError(
                f"the output folder {out} is not empty: it holds {found[0]}{more}", hint="give a new folder"
            )


def refuse_other_merging(checkpoint: Checkpoint, out: Path, merging: Merging | None) -> None:
    """Raise OutputError where the folder holds another output than this merging's, finished or not, before long work is done for it.

    Args:
        checkpoint: the source.
        out: the output folder.
        merging: the groups, whose neurons are not matched yet; None before they are known, when no begun output can be this merging's.
    """
    if (done := finished(out)) is not None:
        begun = done.merging
    elif (out / UNFINISHED_NAME).exists():
        begun = _begun_merging(out)
    else:
        return
    if merging is not None and begun is not None and replace(begun, alignment="") == merging:
        return
    refuse_folder(checkpoint, out)
    raise OutputError(
        f"{out} holds the unfinished output of another command (other merging)",
        hint="repeat that command, or give another folder",
    )


def _begun_merging(out: Path) -> Merging | None:
    """What an unfinished output's marker says of its groups; None where it says nothing that can be read."""
    try:
        return Merging.from_json(parse_json(read_small(out, UNFINISHED_NAME), origin=UNFINISHED_NAME)["merging"])
    except (CheckpointError, KeyError, ValueError):
        return None


@contextmanager
def _claimed(out: Path, command: Mapping[str, Any], expected: Iterable[str]) -> Iterator[None]:
    """Work on the folder alone, with its marker in place from the first file on until all are on the disk."""
    with alone(out, out / LOCK_NAME):
        marker = out / UNFINISHED_NAME
        if not marker.exists():
            sync_folder(out.parent)
            write_file(marker, (json.dumps(command, indent=2) + "\n").encode())
        _refuse_other_command(out, marker.read_bytes(), command)
        _refuse_foreign_files(out, {*expected, UNFINISHED_NAME})
        yield
        marker.unlink()
        sync_folder(out)


def _refuse_other_command(out: Path, text: bytes, command: Mapping[str, Any]) -> None:
    try:
        begun = json.loads(text)
    except ValueError:
        begun = None
    if begun == json.loads(json.dumps(command)):
        return
    differing = sorted(key for key in command if not isinstance(begun, dict) or begun.get(key) != command[key])
    raise OutputError(
        f"{out} holds the unfinished output of another command (other {', '.join(differing) or 'contents'})",
        hint="repeat that command, or give another folder",
    )


def _refuse_foreign_files(out: Path, expected: set[str]) -> None:
    for path in sorted(walk(out)):
        name = path.relative_to(out).as_posix()
        if path.is_symlink():
            raise OutputError(f"the output folder {out} holds the link {name}", hint="remove it, or give a new folder")
        if path.is_file() and not name.startswith(OWN_FOLDER + "/") and name.removesuffix(PARTIAL) not in expected:
            raise OutputError(
                f"the unfinished output {out} holds {name}, which this command does not write",
                hint="remove it, or give a new folder",
            )


def _write_shards(
    checkpoint: Checkpoint, shards: Mapping[str, list[OutputTensor]], out: Path, progress: Progress
) -> None:
    headers = {
        file: encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata=_METADATA)
        for file, tensors in shards.items()
    }
    sizes = {file: len(headers[file]) + sum(tensor.nbytes for tensor in tensors) for file, tensors in shards.items()}
    whole = {file for file in shards if _is_whole(out / file, sizes[file], headers[file])}
    _require_space(checkpoint, out, sum(size for file, size in sizes.items() if file not in whole))
    total, done = sum(sizes.values()), 0
    counting, stopped = Lock(), Event()

    def advance(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise CancelledError
        with counting:
            done += count
            progress("writing", done, total, "B")

    def write(file: str) -> None:
        if not (stopped.is_set() or is_asked_to_stop()):
            _write_shard(checkpoint, headers[file], shards[file], out / file, advance, readers)

    for file in whole:
        advance(sizes[file])
    from_hub = [file for file in shards if file not in whole and landing.comes_from_the_hub(checkpoint, shards[file])]
    missing = [file for file in shards if file not in whole and file not in from_hub]
    with (
        Readers(_FILES_AT_ONCE) as readers,
        deferred("the running files are written"),
        ThreadPoolExecutor(_FILES_AT_ONCE) as writers,
    ):
        try:
            for future in as_completed([writers.submit(write, file) for file in missing]):
                future.result()
        except BaseException:
            stopped.set()
            raise
    with deferred("the running requests are done"):
        for file in from_hub:  # one after the other, each by several requests
            safe_point()
            write(file)
    safe_point()


def _is_whole(path: Path, size: int, header: bytes) -> bool:
    """Whether a shard was already renamed into place, which happens only to whole ones."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as stream:
        return stream.read(len(header)) == header


def _require_space(checkpoint: Checkpoint, out: Path, missing: int) -> None:
    # What an interrupted run left of a shard is written over, so its space counts as free.
    partial = sum(path.stat().st_size for path in out.glob(f"*.safetensors{PARTIAL}"))
    needed = missing + sum((checkpoint.path / name).stat().st_size for name in checkpoint.sidecars)
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + partial
    if needed > free:
        raise OutputError(
            f"{out} needs {needed / 1e9:,.3f} GB and its disk has {free / 1e9:,.3f} GB free",
            hint="free some space and repeat the command, or give a folder on another disk",
        )


def _write_shard(
    checkpoint: Checkpoint,
    header: bytes,
    tensors: list[OutputTensor],
    path: Path,
    advance: Advance,
    readers: Readers,
) -> None:
    source_file = tensors[0].info.file
    if landing.comes_from_the_hub(checkpoint, tensors):
        landing.land(checkpoint, header, tensors, path, path.parent / LANDED / f"{path.name}.jsonl", advance)
        return
    with (
        _copying(checkpoint, source_file, path) as (source, target),
        Direct.opened(source, file=source_file, readers=readers) as direct,
    ):

        def append(content: bytes | memoryview) -> None:
            write_all(target, content)
            advance(len(content))

        def reader_of(piece: tuple[int, int] | memoryview) -> Direct | None:
            return direct if direct is not None and isinstance(piece, tuple) and direct.is_for(*piece) else None

        append(header)
        for reader, pieces in itertools.groupby(_joined(_pieces(checkpoint, tensors)), reader_of):
            if reader is not None:
                with closing(reader.read(piece for piece in pieces if isinstance(piece, tuple))) as contents:
                    for content in contents:
                        append(content)
                continue
            for piece in pieces:
                if isinstance(piece, tuple):
                    _copy_range(source, target, *piece, file=source_file, advance=advance)
                else:
                    append(piece)


def _pieces(checkpoint: Checkpoint, tensors: Iterable[OutputTensor]) -> Iterator[tuple[int, int] | memoryview]:
    """What a shard consists of: byte ranges of the source's shard, and computed bytes."""
    for tensor in tensors:
        source = tensor.source
        if isinstance(source, Copy) or (isinstance(source, Take) and source.num_blocks == 1):
            yield from edits.spans(source)
        else:
            with _computing:
                computed = edits.compute(checkpoint, source)
            yield computed


def _joined(pieces: Iterable[tuple[int, int] | memoryview]) -> Iterator[tuple[int, int] | memoryview]:
    """The same pieces with neighbouring byte ranges made one: kept tensors mostly follow each other."""
    start = stop = 0
    for piece in pieces:
        if isinstance(piece, tuple) and piece[0] == stop:
            stop = piece[1]
            continue
        if stop > start:
            yield start, stop
        start = stop = 0
        if isinstance(piece, tuple):
            start, stop = piece
        else:
            yield piece
    if stop > start:
        yield start, stop


def _copy_range(source: FileIO, target: FileIO, start: int, stop: int, *, file: str, advance: Advance) -> None:
    """Append a byte range: inside the kernel where the file systems allow it, else by reading and writing."""
    if hasattr(os, "copy_file_range"):
        while start < stop:
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), min(stop - start, _CHUNK_BYTES), start)
            except OSError as error:
                if error.errno not in _NO_RANGE_COPY:
                    raise
                break
            if not count:  # the end of the file, or a file system that only pretends: reading tells which
                break
            start += count
            advance(count)
    source.seek(start)
    while start < stop:
        with reading(file):
            chunk = source.read(min(stop - start, _CHUNK_BYTES))
        if not chunk:
            raise shorter(file)
        write_all(target, chunk)
        start += len(chunk)
        advance(len(chunk))


def _copy_sidecar(checkpoint: Checkpoint, name: str, out: Path) -> None:
    make_folder((out / name).parent)
    with _copying(checkpoint, name, out / name) as (source, target):
        while chunk := _read(source, file=name):
            write_all(target, chunk)


@contextmanager
def _copying(checkpoint: Checkpoint, file: str, path: Path) -> Iterator[tuple[FileIO, FileIO]]:
    """A file of the source and a new one, open; which of the two the system refuses is what its error says."""
    with reading(file):
        source = (checkpoint.path / file).open("rb", buffering=0)
    with source, appearing(path) as target:
        yield source, target


def _read(source: FileIO, *, file: str) -> bytes:
    with reading(file):
        return source.read(_CHUNK_BYTES)
