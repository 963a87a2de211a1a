"""`reapkit serve` with the real vLLM: it starts, answers, is held to our own forward, ends, and its arithmetic is vLLM's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import ENVIRONMENT, HERE, REPOSITORY, VLLM, require_vllm
from test_served_families import write_original

import tiny
from families import FAMILIES
from reapkit import capacity, dialects, geometry, probes
from reapkit.capacity import Parallel
from reapkit.gpus import GPUS

pytestmark = pytest.mark.serve

MODEL = REPOSITORY / "models" / "m2-nano"
CONTEXT = 2048
WITHIN_S = 900


@pytest.fixture(scope="module", autouse=True)
def vllm_installed() -> None:
    require_vllm()


def in_vllm(code: str, **environment: str) -> Any:
    """What a snippet prints last, as JSON, in vLLM's environment."""
    done = subprocess.run(
        [VLLM / "python", "-c", code], env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True, timeout=WITHIN_S
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_parsers_and_flags_are_the_installed_vllms() -> None:
    """Every parser that is named is registered, and the words of the model card and of the hints are understood."""
    found = in_vllm("""
import json
from vllm.tool_parsers import ToolParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.config.cache import CacheConfig
card = ("--tensor-parallel-size 8 --tool-call-parser minimax_m2 --reasoning-parser minimax_m2_append_think --trust-remote-code "
        "--enable_expert_parallel --enable-auto-tool-choice").split()
more = ("--pipeline-parallel-size 2 --max-model-len 1000 --max-num-seqs 5 --kv-cache-dtype fp8 --gpu-memory-utilization 0.83 "
        "--moe-backend triton --host 127.0.0.1 --port 8001").split()
read = make_arg_parser(FlexibleArgumentParser()).parse_args(card + more)
backends = [make_arg_parser(FlexibleArgumentParser()).parse_args(["--moe-backend", name]).moe_backend for name in ("deep_gemm", "marlin")]
print(json.dumps({
    "tools": ToolParserManager.list_registered(), "reasoning": ReasoningParserManager.list_registered(),
    "card": [read.tensor_parallel_size, read.tool_call_parser, read.reasoning_parser, read.trust_remote_code, read.enable_expert_parallel,
             read.enable_auto_tool_choice],
    "more": [read.pipeline_parallel_size, read.max_model_len, read.max_num_seqs, read.kv_cache_dtype, read.gpu_memory_utilization,
             read.moe_backend, read.host, read.port],
    "backends": backends, "utilization": CacheConfig().gpu_memory_utilization,
}))
""")  # fmt: skip
    assert {row.tools for row in dialects.DIALECTS} - {None} <= set(found["tools"])
    assert {row.reasoning for row in dialects.DIALECTS} - {None} <= set(found["reasoning"])
    assert found["card"] == [8, "minimax_m2", "minimax_m2_append_think", True, True, True]
    assert found["more"] == [2, 1000, 5, "fp8", 0.83, "triton", "127.0.0.1", 8001]
    assert found["backends"] == ["deep_gemm", "marlin"]
    assert {gpu.utilization for gpu in GPUS if not gpu.unified} == {found["utilization"]}


def test_families_that_can_balance_experts_are_the_installed_vllms() -> None:
    """The files of vLLM's that name the protocol, and none for the families of which it is said that it is not for them."""
    folder = Path(in_vllm("import json, vllm; print(json.dumps(vllm.__path__[0]))")) / "model_executor/models"
    naming = {path.stem for path in folder.glob("*.py") if "MixtureOfExperts" in path.read_text()}
    files = {
        "qwen3_5_moe": "qwen3_5", "qwen3_5_moe_text": "qwen3_5", "deepseek_v3": "deepseek_v2", "deepseek_v32": "deepseek_v2",
        "glm_moe_dsa": "deepseek_v2", "kimi_k2": "deepseek_v2", "llama4_text": "llama4", "ernie4_5_moe": "ernie45_moe",
        "mimo_v2_flash": "mimo_v2",
    }  # fmt: skip
    assert {files.get(name, name) for name in dialects.BALANCES_EXPERTS} <= naming
    assert not {"minimax_m2", "gpt_oss", "longcat_flash", "qwen2_moe", "olmoe", "jamba"} & naming


@pytest.mark.parametrize("name", ["Qwen3-MoE", "gpt-oss", "DeepSeek-V3"])
def test_the_cache_holds_as_many_tokens_as_vllm_prints(name: str, tmp_path: Path) -> None:
    """Plain, sliding and latent attention; vLLM's own number, from a running engine, to the token."""
    folder = tmp_path / "model"
    write_original(next(family for family in FAMILIES if family.name == name), folder)
    done = subprocess.run(
        [VLLM / "python", HERE / "cache_size.py"],
        input=json.dumps({"models": [{"model": str(folder), "max_model_len": 512, "max_num_batched_tokens": 128}]}),
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True, text=True, timeout=WITHIN_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (said,) = json.loads(done.stdout)
    assert isinstance(said, dict), said
    config = tiny.read_json(folder / "config.json")
    shape = geometry.read(config, config["num_hidden_layers"])
    assert shape is not None
    pool = capacity.pool(shape, Parallel(), value_bytes=4, block_tokens=said["block_tokens"])
    assert pool.cached_tokens(said["nbytes"], said["context"], in_flight=said["in_flight"]) == said["tokens"]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_m2_nano_is_started_questioned_and_ended(share: float, tmp_path: Path) -> None:
    """Unpruned and pruned, dequantised, in float32: every greedy token is our own forward's, and nothing is left running."""
    kept = round(48 * (1 - share))
    reapkit("plan", MODEL, "--criterion", "random", "--keep", kept, "-o", tmp_path / "plan.json")
    reapkit("prune", MODEL, tmp_path / "plan.json", "-o", tmp_path / "model", "--dequantize")
    command = [
        sys.executable, "-m", "reapkit", "serve", tmp_path / "model", "--run", "--program", VLLM.parent, "--port", "0",
        "--log", tmp_path / "log", "--max-model-len", str(CONTEXT), "--", "--dtype", "float32", "--enforce-eager",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT) as process:
        try:
            assert process.stderr is not None
            heard = []
            for line in process.stderr:
                heard.append(line)
                if "Ctrl-C ends it" in line:
                    break
            (address,) = re.findall(r"answers at (\S+)/v1", "".join(heard))
            described = json.loads(
                reapkit("serve", tmp_path / "model", "--check", "--url", address, "--dtype", "float32", "--json")
            )
            call = tool_call_of(address)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)
    assert process.returncode == 130
    running = [
        other.info["cmdline"] for other in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(other.info["cmdline"] or [])
    ]  # fmt: skip
    assert running == []

    answers = {answer["name"]: answer for answer in described["checks"]}
    assert described["ok"], answers
    # m2-nano knows its own kind of tools, and says of this one that it does not fit.
    assert {name: answer["verdict"] for name, answer in answers.items() if name != "tool call"} == dict.fromkeys(
        ("completion", "chat", "long prompt", "greedy tokens"), "yes"
    )
    if not share:  # what random pruning leaves may answer in words
        assert call == "yes"
    assert answers["greedy tokens"]["equal"] == answers["greedy tokens"]["tokens"] == 128
    assert answers["long prompt"]["prompt_tokens"] > 0.9 * (CONTEXT - 16)

    log = (tmp_path / "log").read_text()
    (tokens,) = re.findall(r"CPU KV cache size: ([\d,]+) tokens", log)
    config = tiny.read_json(tmp_path / "model/config.json")
    shape = geometry.read(config, 6)
    assert shape is not None
    pool = capacity.pool(shape, Parallel(), value_bytes=4, block_tokens=128)
    assert pool.cached_tokens(1 << 30, CONTEXT, in_flight=0) == int(tokens.replace(",", ""))


def tool_call_of(address: str) -> str:
    """The verdict on a tool call with a tool of the kind that the model was trained on."""
    rows = map(json.loads, (MODEL / "data" / "heldout.jsonl").read_text().splitlines())
    calling = (row for row in rows if row["domain"] == "tools" and len(row["messages"][-1].get("tool_calls", ())) == 1)
    row = next(row for row in calling if row["level"] == 2 and len(row["messages"]) == 2)
    called = row["messages"][-1]["tool_calls"][0]["function"]["name"]
    (tool,) = [tool for tool in row["tools"] if tool["function"]["name"] == called]
    probed = probes.check(address, tool=tool, asked=row["messages"][0]["content"])
    return next(probe.verdict for probe in probed if probe.name == "tool call")


def reapkit(*arguments: object) -> str:
    command = [sys.executable, "-m", "reapkit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=WITHIN_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
