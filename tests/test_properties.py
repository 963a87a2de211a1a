"""Whatever the family, the shapes, the shards and the plan: what prune writes verifies, and keeping all changes no byte."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from reapkit import plans, shards, verify
from reapkit.architectures import ARCHITECTURES
from reapkit.checkpoint import Checkpoint
from reapkit.layout import Architecture, Identity, resolve
from reapkit.plans import PruningPlan
from reapkit.tensors import encode_header, nbytes

FAMILIES = [entry for entry in ARCHITECTURES if not entry.refusal]


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Architecture, dict[str, Any], dict[str, tuple[str, tuple[int, ...]]], int]:
    """A family, a config, its tensors' dtypes and shapes, and the number of shards; no dimension but the experts' is a multiple of E."""
    entry = draw(st.sampled_from(FAMILIES))
    num_experts = draw(st.sampled_from((4, 6, 8)))
    num_layers = draw(st.integers(1, 3))
    zero = draw(st.integers(1, 3)) if entry.num_zero_experts_key else 0
    counts: dict[str, Any] = {entry.num_experts_keys[0]: num_experts, entry.top_k_keys[0]: 2}
    if entry.num_zero_experts_key:
        counts[entry.num_zero_experts_key] = zero
    config: dict[str, Any] = {"model_type": entry.model_types[0], entry.num_layers_keys[0]: num_layers}
    config |= {entry.experts_section: counts} if entry.experts_section else counts
    if draw(st.booleans()) and not entry.experts_section:
        config = {"model_type": entry.model_types[0], "text_config": config}
    block = draw(st.sampled_from(entry.blocks))
    stacked = draw(st.booleans())
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.norm.weight": ("BF16", (5,))}
    dtypes = st.sampled_from(("BF16", "F32", "F8_E4M3", "U8", "I32"))
    slots = [slot for slot in entry.slots if slot.axis is not None or not stacked]
    if not any(slot.role == "expert" for slot in slots):
        slots = list(entry.slots)
    for layer in range(num_layers):
        if layer and draw(st.booleans()):
            tensors[f"{block.format(layer=layer)}dense.weight"] = ("BF16", (3, 5))
            continue
        for slot in slots:
            name = block.format(layer=layer) + slot.pattern.replace("{rest}", "part.weight")
            plain = slot.role != "expert"
            dtype = "F32" if plain else draw(dtypes)
            if slot.axis is None:
                for expert in range(num_experts):
                    tensors[name.replace("{expert}", str(expert))] = (dtype, (3, 5))
                continue
            size = num_experts + (zero if slot.holds == "experts and zero experts" else 0)
            size *= 3 if slot.holds == "rows of experts" else 1
            tensors[name] = (
                dtype,
                (*(1 for _ in range(slot.axis)), size, 5) if not plain else (*(1,) * slot.axis, size, 7),
            )
    return entry, config, tensors, draw(st.integers(1, 4))


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], num_shards: int
) -> None:
    """Random bytes under these names, spread over the shards in turn."""
    random = np.random.default_rng(len(tensors))
    folder.mkdir()
    weight_map = {name: f"model-{number % num_shards}.safetensors" for number, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        held = [(name, *tensors[name]) for name in tensors if weight_map[name] == file]
        body = b"".join(random.bytes(nbytes(dtype, shape)) for _, dtype, shape in held)
        (folder / file).write_bytes(encode_header(held, metadata={"format": "pt"}) + body)
    tiny.write_json(folder / "config.json", config)
    tiny.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(checkpoints(), st.data())
def test_what_prune_writes_verifies_and_keeping_all_is_the_identity(
    drawn: tuple[Architecture, dict[str, Any], dict[str, tuple[str, tuple[int, ...]]], int], data: st.DataObject
) -> None:
    _, config, tensors, num_shards = drawn
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "source"
        write(folder, config, tensors, num_shards)
        checkpoint = Checkpoint.open(folder)
        layout = resolve(checkpoint, ARCHITECTURES)
        keep = data.draw(st.integers(2, layout.num_experts))
        kept = {
            layer: tuple(sorted(data.draw(st.permutations(range(layout.num_experts)))[:keep]))
            for layer in layout.layer_indices
        }
        plan = PruningPlan(Identity.of(checkpoint, layout), "random", layout.num_experts, layout.top_k, kept)
        manifest = shards.write(checkpoint, layout, plan, Path(scratch) / "out")
        assert verify(Path(scratch) / "out", source=folder).problems == ()
        assert resolve(Checkpoint.open(Path(scratch) / "out"), ARCHITECTURES).num_experts == keep
        assert (manifest.after.bytes == manifest.before.bytes) == (keep == layout.num_experts)
        everything = plans.plan(folder, criterion="random", keep=layout.num_experts)
        shards.write(checkpoint, layout, everything, Path(scratch) / "all")
        same = Checkpoint.open(Path(scratch) / "all")
        assert same.tensors.keys() == checkpoint.tensors.keys()
        assert all(same.read(same.tensors[name]) == checkpoint.read(info) for name, info in checkpoint.tensors.items())
