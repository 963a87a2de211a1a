"""Suspended activations may leave the device: what is computed stays the same to the bit. With pinned memory: test_gpu.py."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from families import FAMILIES, Family, make
from reapkit import observation as module
from reapkit.activations import Spill, is_spillable
from reapkit.errors import UsageError
from reapkit.modules import SuspendedForwards
from reapkit.observation import Observation, Run
from streaming import CPU, streamed_logits, streamed_model, text_rows, token_batches, write_jsonl

RUN = Run(device="cpu", dtype="float32")
# Alternating masks, hidden states in several streams, values carried from layer to layer, state-space layers, scaled embeddings.
CARRYING = ("gpt-oss", "DeepSeek-V3.2", "GLM-5", "Qwen3-Next", "Gemma-4", "Jamba", "MiniMax-M2")


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name in CARRYING], ids=lambda family: family.name
)
def test_logits_stay_the_same_to_the_bit_when_hidden_states_go_to_a_file_and_back(
    family: Family, tmp_path: Path
) -> None:
    make(family, tmp_path / "model")
    model, inputs = streamed_model(tmp_path / "model"), token_batches()
    expected = streamed_logits(model, inputs)
    nbytes = []
    with SuspendedForwards(model, inputs, place="disk") as forwards:
        forwards.run_layers(lambda layer, number: nbytes.append(held_in_memory(forwards)))
        for logits, whole in zip(forwards.logits(), expected, strict=True):
            assert torch.equal(logits, whole)
    # The micro-batch that comes next is in memory already, and no other.
    assert max(nbytes) <= 3 * max(ids_BT.size for ids_BT in inputs) * model.hidden_size * 4


def held_in_memory(forwards: SuspendedForwards) -> int:
    return sum(tensor.untyped_storage().nbytes() for forward in forwards._forwards for tensor in forward.held())


def test_statistics_are_the_same_to_the_bit_wherever_activations_are_kept(
    m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 200)
    folder = tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path / "m2")))
    text = write_jsonl(tmp_path / "text.jsonl", text_rows(23))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    files = []
    for place in ("device", "disk"):
        observation = Observation(folder, [text], run=replace(RUN, place=place), max_length=48, seed=0)
        assert observation.place == observation.estimate().place == place
        observation.run().save(tmp_path / place)
        files.append((tmp_path / place).read_bytes())
    assert files[0] == files[1]
    assert list(temporary.iterdir()) == [], "nothing is left behind, whatever ends the run"


def test_what_is_spilled_gives_up_its_memory_and_comes_back() -> None:
    spill, tensor = Spill(CPU, "disk"), torch.randn(5, 7)
    expected = tensor.clone()
    for _ in range(2):
        spill.take_out(0, [tensor])
        assert tensor.untyped_storage().nbytes() == 0
        spill.require(0)
        assert torch.equal(tensor, expected)


def test_only_tensors_that_own_their_memory_are_spilled() -> None:
    tensor = torch.randn(4, 6)
    assert is_spillable(tensor) and is_spillable(tensor.view(6, 4))
    unfit = (None, "text", np.zeros(3), tensor[1:], tensor[:, :2], tensor.long(), torch.nn.Parameter(tensor))
    assert not any(map(is_spillable, unfit))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (replace(RUN, place="disc"), "activations cannot be kept on 'disc'"),
        (replace(RUN, place="host"), "on a CPU suspended activations are in the host's memory already"),
    ],
)
def test_a_place_that_is_not_there_is_named(run: Run, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run.resolve()
    assert caught.value.hint is not None and "disk" in caught.value.hint
