"""Vanilla vLLM serves what reapkit writes, and serves the right experts.

That a checkpoint loads proves little: vLLM drops or leaves uninitialised what it does not find, silently, so experts that were not
renumbered load as well as those that were. And two engines that read the same pruned folder agree on whatever is wrong with it. So the
text of the pruned checkpoint is held against the *original* whose router is masked to the kept experts, computed by transformers from
the original's own bytes. In float32, all tokens must be equal; bfloat16 would flip near-ties.

README.md in this folder says what was served and what was not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import ENVIRONMENT, NEVER_CHOSEN, REPOSITORY, VLLM, continued, greedy, one_thread, require_vllm

pytestmark = pytest.mark.serve

MODEL = REPOSITORY / "models" / "m2-nano"

NUM_EXPERTS = 48
CHATS = ("arithmetic", "lookup", "python", "tools")
NUM_TOKENS = 32
MAX_LENGTH = 2048
# Two idle cores need about a minute for two servers at once; a busy machine several times that. Too short fails for no reason.
HEALTHY_WITHIN_S = 300

# Becomes the command, beside a watcher that waits for the end of standard input and then ends the whole process group: a pipe is
# closed however the tests end, also by a kill that runs no finalizer.
LEASHED = 'exec 3<&0; (read -r _ <&3; kill -KILL 0) & exec "$@" 3<&- </dev/null'


@dataclass(frozen=True)
class Checkpoints:
    """The two folders that are served, both dequantised, and the experts that the second kept, by layer."""

    original: Path
    pruned: Path
    kept: Mapping[int, list[int]]


@dataclass(frozen=True)
class Reference:
    """Prompts, and how the original with its router masked to the kept experts continues them."""

    prompts: list[list[int]]
    continuations: list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def vllm_installed() -> None:
    require_vllm()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A quarter of the experts pruned, and none pruned, by the command line, as a user would."""
    folder = tmp_path_factory.mktemp("checkpoints")
    stats = folder / "stats.safetensors"
    data = MODEL / "data" / "calibration.jsonl"
    reapkit("observe", MODEL, "--data", data, "-o", stats)
    for name, count in {"original": ("--keep", NUM_EXPERTS), "pruned": ("--ratio", 0.25)}.items():
        plan = folder / f"{name}.json"
        reapkit("plan", stats, "--criterion", "reap", *count, "-o", plan)
        reapkit("prune", MODEL, plan, "-o", folder / name, "--dequantize")
    kept = json.loads((folder / "pruned.json").read_text())["kept"]
    return Checkpoints(folder / "original", folder / "pruned", {int(layer): experts for layer, experts in kept.items()})


def reapkit(*arguments: object) -> None:
    command = [sys.executable, "-m", "reapkit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def servers(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Address of each checkpoint's server, by name. Both start at once: most of a start is one core importing."""
    logs = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(served(folder, log=logs / f"{name}.log"))
            for name, folder in {"original": checkpoints.original, "pruned": checkpoints.pruned}.items()
        }
        for name, (process, address) in started.items():
            wait_until_healthy(process, address, log=logs / f"{name}.log")
        yield {name: address for name, (_, address) in started.items()}


@contextmanager
def served(model: Path, *, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A `vllm serve` with the model card's flags, on loopback, in a process group that is ended with the block.

    Eager, because compiling takes a minute of each start and changes nothing that is asked here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [VLLM / "vllm", "serve", model, "--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--tool-call-parser", "minimax_m2", "--reasoning-parser", "minimax_m2_append_think"]
    command += ["--enable-auto-tool-choice", "--trust-remote-code", "--max-num-seqs", "64"]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--enforce-eager"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-c", LEASHED, "sh", *command],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a server, its engine and its watcher: kindly, then for certain. The group outlives its leader, so it is always signalled."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, *, log: Path) -> None:
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    state = "is still starting" if process.poll() is None else f"ended with {process.returncode}"
    pytest.fail(f"the server {state}; end of {log}:\n{log.read_text(errors='replace')[-6000:]}")


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    """Greedy reply to one request; an HTTP error fails with what the server said."""
    request = urllib.request.Request(
        f"{address}/v1/{path}",
        data=json.dumps({"model": "model", "temperature": 0} | body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        pytest.fail(f"{path}: {error.code} {error.read().decode(errors='replace')}")


def rows(domain: str) -> list[dict[str, Any]]:
    """Held-out conversations of one domain, each ending with the assistant's reference turn."""
    lines = (MODEL / "data" / "heldout.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["domain"] == domain]


def in_parallel(address: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat replies' messages, asked for at once as a batch of users would."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = pool.map(lambda body: ask(address, "chat/completions", max_tokens=512, **body), bodies)
        return [reply["choices"][0]["message"] for reply in replies]


@pytest.fixture(scope="module")
def reference(checkpoints: Checkpoints, servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The original, masked, continued by transformers in float32: no part of this goes through reapkit or vLLM."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chats = [row for domain in CHATS for row in rows(domain)[:3]]
    prompts = [
        tokenizer.apply_chat_template(
            row["messages"][:-1], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
        for row in chats
    ]
    folder = tmp_path_factory.mktemp("reference")
    write_masked(checkpoints.kept, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with one_thread():
        return Reference(prompts, [continued(model, prompt, NUM_TOKENS) for prompt in prompts])


def write_masked(kept: Mapping[int, list[int]], folder: Path) -> None:
    """The original with dropped experts never chosen, and its FP8 blocks multiplied out to bfloat16 here, not by what is under test."""
    config = json.loads((MODEL / "config.json").read_text())
    block = config.pop("quantization_config", {}).get("weight_block_size")
    stored = tensors_of(MODEL)
    written = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            tensor = (tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
        if name.endswith(".e_score_correction_bias"):
            masked = torch.full_like(tensor, NEVER_CHOSEN)
            experts = kept[int(name.split(".")[2])]
            masked[experts] = tensor[experts]
            tensor = masked
        written[name] = tensor
    write_copy(MODEL, folder, written)
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(model.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def write_copy(model: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every small file of `model`, and these tensors in one shard."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["original", "pruned"])
def test_completes_and_reasons(servers: dict[str, str], name: str) -> None:
    """A text is completed, and a chat's reasoning and answer come back in the form that this reasoning parser promises."""
    completion = ask(servers[name], "completions", prompt="Count: one two three", max_tokens=8)
    assert completion["usage"]["completion_tokens"] >= 1

    asked = [{"messages": row["messages"][:-1]} for row in rows("arithmetic")[:8]]
    texts = [message["content"] for message in in_parallel(servers[name], asked)]
    assert all(text.startswith("<think>") for text in texts), texts
    thought = [text.removeprefix("<think>").partition("</think>") for text in texts]
    complete = sum(bool(reasoning.strip() and answer.strip()) for reasoning, _, answer in thought)
    assert complete > len(texts) / 2, texts


def test_tool_calls_are_parsed(servers: dict[str, str]) -> None:
    """Replies to requests with tools arrive as `tool_calls`; the unpruned model's are mostly the right ones."""
    asked = [row for row in rows("tools") if "tool_calls" in row["messages"][-1]][:12]
    wanted = [[call["function"] for call in row["messages"][-1]["tool_calls"]] for row in asked]
    right = {}
    for name, address in servers.items():
        bodies = [{"messages": row["messages"][:-1], "tools": row["tools"]} for row in asked]
        got = [called(message) for message in in_parallel(address, bodies)]
        offered = [{tool["function"]["name"] for tool in row["tools"]} for row in asked]
        parsed = sum(
            bool(calls) and {call["name"] for call in calls} <= names for calls, names in zip(got, offered, strict=True)
        )
        assert parsed > len(asked) / 2, f"{name}: {parsed} of {len(asked)} replies parsed: {got}"
        right[name] = sum(calls == due for calls, due in zip(got, wanted, strict=True))
    assert right["original"] >= len(asked) / 2, f"right calls of {len(asked)}: {right}"


def called(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Names and decoded arguments of a reply's tool calls."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [{"name": function["name"], "arguments": json.loads(function["arguments"])} for function in functions]


def test_serves_the_kept_experts(servers: dict[str, str], reference: Reference) -> None:
    """The pruned checkpoint, served, says token for token what the original says with its router masked to the kept experts."""
    reply = ask(
        servers["pruned"],
        "completions",
        prompt=reference.prompts,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        return_token_ids=True,
    )
    assert [choice["token_ids"] for choice in reply["choices"]] == reference.continuations


def test_a_wrong_checkpoint_is_noticed(checkpoints: Checkpoints, reference: Reference, tmp_path: Path) -> None:
    """The comparison has teeth: with two experts of one layer swapped on disk vLLM loads as before and says something else."""
    tensors = tensors_of(checkpoints.pruned)
    one, other = (f"model.layers.0.block_sparse_moe.experts.{expert}." for expert in (0, 1))
    for name in [name for name in tensors if name.startswith(one)]:
        partner = name.replace(one, other)
        tensors[name], tensors[partner] = tensors[partner], tensors[name]
    write_copy(checkpoints.pruned, tmp_path / "swapped", tensors)

    right, wrong = greedy(
        [{"model": checkpoints.pruned}, {"model": tmp_path / "swapped"}],
        reference.prompts,
        NUM_TOKENS,
        within_s=HEALTHY_WITHIN_S,
    )
    assert right == reference.continuations
    assert isinstance(wrong, list) and wrong != reference.continuations
