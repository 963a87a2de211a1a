"""What `--dequantize` writes is what quantisers take: the documentation's example, run with llm-compressor itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import quantized
import tiny
from reapkit import plans, prune
from reapkit.checkpoint import Checkpoint
from reapkit.quantization import read_format
from streaming import streamed_logits, streamed_model, token_batches

pytestmark = pytest.mark.quantize

REPOSITORY = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("REAPKIT_QUANTIZE_VENV", REPOSITORY / ".venv-quantize")) / "bin/python"


@pytest.fixture(autouse=True)
def llm_compressor_installed() -> None:
    if not PYTHON.exists():
        missing = f"no llm-compressor in {PYTHON.parents[1]}; make quantize-check makes it"
        if os.environ.get("REAPKIT_REQUIRE_QUANTIZE") == "1":
            pytest.fail(missing)
        pytest.skip(missing)


def test_a_dequantised_pruned_output_is_quantised_afresh_with_its_routers_left_alone(
    qwen3: Path, tmp_path: Path
) -> None:
    source = tiny.add_tokenizer(quantized.make(qwen3, tmp_path / "fp8", "fp8-block"))
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    manifest = prune(source, plans.plan(source, criterion="random", ratio=0.25), pruned, dequantize=True)
    command = [PYTHON, REPOSITORY / "examples/requantize.py", pruned, out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.rindex("{") :])
    assert result["routers_ignored"] == result["routers"] == len(manifest.routers) == 2
    # Quantised afresh in eight bits, activations too: not the same values, and not others either.
    assert 0 < result["logits_relative_difference"] < 0.2

    # The result is once more a checkpoint that reapkit reads: scales per channel in place of blocks, routers as they were.
    checkpoint = Checkpoint.open(out)
    assert read_format(checkpoint).name == "FP8 (compressed-tensors)"
    before, after = tiny.load_tensors(pruned), {name: info.dtype for name, info in checkpoint.tensors.items()}
    assert all(after[name] == "BF16" for name in manifest.routers)
    ours, theirs = (streamed_logits(streamed_model(folder), token_batches()) for folder in (out, pruned))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.2 * other.norm()
    assert {name for name in before if "experts" in name} <= after.keys()
