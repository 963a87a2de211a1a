"""Checkpoints read from a hub: the same bytes as from a folder, no more of them than needed, and a sentence for whatever goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny
from loopback_hub import TOKEN, Fault, LoopbackHub, Repo, Request, assert_without_token, connect, home  # noqa: F401
from reapkit import hub as hubs
from reapkit import plans, shards
from reapkit.architectures import ARCHITECTURES
from reapkit.cards import inline
from reapkit.checkpoint import Checkpoint
from reapkit.compression import prune, transfer
from reapkit.errors import CheckpointError, HubError, PlanError, ReapkitError, UsageError
from reapkit.inventory import inspect
from reapkit.layout import Identity, resolve
from reapkit.outputs import unfinished
from reapkit.plans import PruningPlan
from reapkit.publishing import publish, push
from reapkit.sources import WASTE, Remote, cut, joined
from reapkit.statistics import Statistics
from reapkit.tensors import encode_header
from reapkit.verification import verify
from streaming import text_rows, write_jsonl

NANO = Path(__file__).parents[1] / "models/m2-nano"
INDEX = "model.safetensors.index.json"
sys.path.insert(0, str(NANO.parents[1] / "benchmarks"))


@pytest.fixture(scope="module")
def served() -> Iterator[LoopbackHub]:
    with LoopbackHub({"org/nano": Repo(NANO)}) as hub:
        yield hub


@pytest.fixture
def hub(served: LoopbackHub, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[LoopbackHub]:  # noqa: F811
    """A hub that this process uses, with a cache of its own, and no patience for what fails for good."""
    served.forget()
    served.repos = {"org/nano": Repo(NANO)}
    served.fault = lambda request: None
    connect(monkeypatch, served, home)
    monkeypatch.setattr(hubs, "WAITS", (0.0, 0.01, 0.01))
    yield served
    assert served.leaked == []  # no token ever reaches the storage


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> PruningPlan:
    return plans.plan(NANO, criterion="random", ratio="0.25")


@pytest.fixture(scope="module")
def reference(plan: PruningPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pruning the folder writes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    prune(NANO, plan, out)
    return out


def assert_same(out: Path, reference: Path, *, plan_named: bool = True) -> None:
    """Every file of the checkpoint is the same, byte for byte; manifest and card say where it came from."""
    own = ("reapkit/", "reapkit.json")
    found, wanted = (
        {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and not path.relative_to(folder).as_posix().startswith(own)
        }
        for folder in (out, reference)
    )
    ours, theirs = (tiny.read_json(folder / "reapkit.json") for folder in (out, reference))
    # A card credits a repository by its id, with a link, and a folder by its name.
    origin, name = ours["source"]["origin"], inline(Path(theirs["source"]["origin"]).name)
    card = found["README.md"].decode()
    assert f"base_model: {origin}\n" in card
    for own, other in (
        (f"base_model: {origin}\n", ""),
        (f"[{origin}](https://huggingface.co/{origin})", name),
        (origin, name),
    ):
        card = card.replace(own, other)
    assert found | {"README.md": card.encode()} == wanted
    for manifest in (ours, theirs):
        for key in ("origin", "revision"):
            manifest["source"].pop(key)
        manifest.pop("digests")
        if not plan_named:  # a published plan names its source otherwise
            manifest.pop("plan")
    assert ours == theirs


def headers_of(folder: Path) -> int:
    checkpoint = Checkpoint.open(folder)
    return sum(min(i.start for i in checkpoint.tensors.values() if i.file == file) for file in checkpoint.files)


# --- reading


def test_inspect_moves_config_index_and_headers_alone(hub: LoopbackHub) -> None:
    found, local = inspect("org/nano").to_json(), inspect(NANO).to_json()
    assert {**found, "origin": ""} == {**local, "origin": ""}
    tables = (NANO / "config.json").stat().st_size + (NANO / INDEX).stat().st_size
    needed = headers_of(NANO) + tables
    moved = hub.moved["storage"] + hub.moved["file"]
    print(f"inspect m2-nano: {moved:,} bytes, {needed:,} of them tables and headers, of {local['nbytes']:,}")
    assert needed <= moved <= 1.001 * needed


def test_inspect_of_minimax_m2s_125_headers_is_23_megabytes_of_230_gigabytes(hub: LoopbackHub, tmp_path: Path) -> None:
    from inventories import minimax_m2, write_sparse

    write_sparse(tmp_path / "m2", *minimax_m2())
    hub.repos["org/m2"] = Repo(tmp_path / "m2")
    found = inspect("org/m2")
    assert (found.shards, found.tensors, found.nbytes, found.parameters) == (
        125,
        96_103,
        230_121_630_720,
        228_689_764_864,
    )
    moved = hub.moved["storage"] + hub.moved["file"]
    index, headers = (tmp_path / "m2" / INDEX).stat().st_size, headers_of(tmp_path / "m2")
    print(f"inspect MiniMax-M2: {moved:,} bytes of {found.nbytes:,}; index {index:,}, headers {headers:,}, "
          f"{hub.requests['storage GET']:,} requests")  # fmt: skip
    assert moved <= 1.001 * (index + headers) < 23_000_000
    hub.forget()
    Checkpoint.open("org/m2")
    assert hub.moved["storage"] + hub.moved["file"] == headers  # the index stays in the cache


def test_inspect_brings_the_chat_template_where_parsers_depend_on_it(hub: LoopbackHub, qwen3: Path) -> None:
    hub.repos["org/qwen"] = Repo(qwen3)
    remote, local = inspect("org/qwen"), inspect(qwen3)
    assert (
        (remote.tool_parser, remote.reasoning_parser) == (local.tool_parser, local.reasoning_parser) == ("hermes", None)
    )


def test_of_a_hub_and_of_a_folder_every_tensor_reads_the_same(hub: LoopbackHub) -> None:
    remote, local = Checkpoint.open("org/nano"), Checkpoint.open(NANO)
    assert remote.revision == hub.repos["org/nano"].commit
    assert (remote.sidecars, remote.layout_fingerprint) == (local.sidecars, local.layout_fingerprint)
    assert remote.tensors == local.tensors
    infos = list(remote.tensors.values())[::37]
    with remote.expecting(infos):
        ahead = [bytes(remote.read(info)) for info in infos]
    assert ahead == [bytes(local.read(info)) for info in infos] == [bytes(remote.read(info)) for info in infos]
    ours, theirs = (Identity.of(checkpoint, resolve(checkpoint, ARCHITECTURES)) for checkpoint in (remote, local))
    assert ours.differing(theirs) is None


def test_what_is_expected_twice_is_fetched_once_and_what_overlaps_too(hub: LoopbackHub) -> None:
    remote = Checkpoint.open("org/nano")
    info = next(info for info in remote.tensors.values() if info.nbytes > 500_000)
    hub.forget()
    with remote.source.expecting([(info.file, info.start, info.stop), (info.file, info.start, info.start + 4096)]):
        whole, begin = bytearray(info.nbytes), bytearray(4096)
        remote.source.read_into(info.file, info.start, memoryview(begin))
        remote.source.read_into(info.file, info.start, memoryview(whole))
    assert bytes(whole[:4096]) == bytes(begin) == (NANO / info.file).read_bytes()[info.start :][:4096]
    assert hub.moved["storage"] == info.nbytes


def test_shards_that_the_cache_has_are_read_there(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan, reference: Path
) -> None:
    from huggingface_hub import hf_hub_download

    shard = "model-00002-of-00003.safetensors"
    hf_hub_download("org/nano", shard)
    hub.forget()
    prune("org/nano", plan, tmp_path / "out")
    assert_same(tmp_path / "out", reference)
    # Its header is read from the hub like the others', in case the cache is damaged.
    assert all(start < 100_000 for file, start, _ in hub.spans if file == shard)


def test_offline_what_the_cache_has_as_a_whole_serves(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: PruningPlan, reference: Path
) -> None:
    from huggingface_hub import constants, snapshot_download

    snapshot_download("org/nano")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    prune("org/nano", plan, tmp_path / "out")
    assert_same(tmp_path / "out", reference)
    assert not hub.requests
    with pytest.raises(HubError, match="not in the hub's cache") as caught:
        Checkpoint.open("org/other")
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)


@pytest.mark.parametrize(
    "command",
    [
        "inspect SRC",
        "observe SRC --data TEXT -o OUT --dry-run",
        "plan SRC --criterion random --ratio 0.25 -o OUT --dry-run",
        "plan SRC --criterion aimer --ratio 0.25 -o OUT --dry-run",
        "plan SRC --recover SRC -o OUT --dry-run",
        "prune SRC PLAN -o OUT --dry-run",
        "compress SRC --data TEXT --ratio 0.25 -o OUT --dry-run",
        "merge SRC NONE -o OUT --method m-smoe --ratio 0.25 --data TEXT --dry-run",
        "compare SRC SRC --data TEXT",
        "compare SRC SRC --data TEXT --prompts PROMPTS",
        "serve SRC",
    ],
)
def test_every_verb_says_how_far_opening_a_repository_is(
    hub: LoopbackHub, tmp_path: Path, m2: Path, command: str
) -> None:
    import shutil

    folder = tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path / "served")))
    (folder / "chat_template.jinja").unlink()  # so that nobody answers prompts, which takes long
    hub.repos["org/m2"] = Repo(folder)
    plans.plan(folder, criterion="random", ratio="0.25").save(tmp_path / "plan.json")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    words = {"SRC": "org/m2", "OUT": tmp_path / "out", "TEXT": write_jsonl(tmp_path / "text.jsonl", text_rows(4)),
             "PLAN": tmp_path / "plan.json", "PROMPTS": prompts, "NONE": tmp_path / "none"}  # fmt: skip
    result = reapkit(*(words.get(word, word) for word in command.split()))
    assert re.search(r"^small files: [\d.]+ kB of ", result.stderr, re.MULTILINE), result.stderr
    assert re.search(r"^headers: [\d.]+ kB of ", result.stderr, re.MULTILINE), result.stderr


# --- pruning


def test_prune_moves_what_is_kept_and_headers_and_writes_the_same_bytes(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan, reference: Path
) -> None:
    manifest = prune("org/nano", plan, tmp_path / "out")
    assert_same(tmp_path / "out", reference)
    needed = manifest.after.bytes + headers_of(NANO)
    moved = hub.moved["storage"] - (NANO / INDEX).stat().st_size
    print(f"prune m2-nano by 25 %: {moved:,} bytes from the shards, {needed:,} kept and headers: {moved / needed:.4f}")
    assert moved <= 1.02 * needed


@pytest.mark.giant
def test_prune_of_minimax_m2s_tensors_in_125_shards_moves_no_more_than_that_either(
    hub: LoopbackHub, tmp_path: Path, small_m2: Path
) -> None:
    import shutil

    folder, out = small_m2, tmp_path / "out"
    hub.repos["org/m2"] = Repo(folder)
    plan = plans.plan(folder, criterion="random", ratio="0.30")
    prune(folder, plan, tmp_path / "reference")
    hub.forget()
    manifest = prune("org/m2", plan, out)
    assert_same(out, tmp_path / "reference")
    needed = manifest.after.bytes + headers_of(folder)
    moved = hub.moved["storage"] - (folder / INDEX).stat().st_size
    print(f"prune 96,103 small tensors in 125 shards by 30 %: {moved:,} bytes, {needed:,} needed: {moved / needed:.4f}, "
          f"{hub.requests['storage GET']:,} requests")  # fmt: skip
    assert moved <= 1.02 * needed
    # Refused in the middle of the 60th shard, and repeated.
    shutil.rmtree(out)
    hub.fault = lambda request: (503, {}) if len(list(out.glob("*.safetensors"))) == 60 else None
    with pytest.raises(HubError, match="did not give model"):
        prune("org/m2", plan, out)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    hub.fault = lambda request: None
    hub.forget()
    prune("org/m2", plan, out)
    assert_same(out, tmp_path / "reference")
    again = hub.moved["storage"]
    print(f"  interrupted after {written:,} bytes, and repeated: {again:,} bytes")
    assert again < moved - 0.9 * written  # headers and fingerprints are read again
    shutil.rmtree(out)
    shutil.rmtree(tmp_path / "reference")


@pytest.mark.giant
def test_prune_of_the_whole_minimax_m2_would_move_no_more_than_that_either(hub: LoopbackHub, tmp_path: Path) -> None:
    from inventories import minimax_m2, write_sparse

    write_sparse(tmp_path / "m2", *minimax_m2())
    hub.repos["org/m2"] = Repo(tmp_path / "m2")
    plan = plans.plan(tmp_path / "m2", criterion="random", ratio="0.30")
    checkpoint = Checkpoint.open("org/m2")
    layout = resolve(checkpoint, ARCHITECTURES)
    plan.require_fits(layout, Identity.of(checkpoint, layout))
    before = hub.moved["storage"] - (tmp_path / "m2" / INDEX).stat().st_size
    found = transfer(checkpoint, plan)
    needed = found.kept_bytes + headers_of(tmp_path / "m2")
    moved = before + found.moved_bytes
    print(f"prune MiniMax-M2 by 30 %: {moved:,} bytes in {found.requests:,} ranges, {needed:,} needed: {moved / needed:.4f}, "
          f"{before:,} of them headers and fingerprints")  # fmt: skip
    assert found.kept_bytes == shards.Size(0, None, found.kept_bytes).bytes > 160e9
    assert moved <= 1.02 * needed


@pytest.fixture(scope="module")
def small_m2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MiniMax-M2's names, dtypes and number of shards, with m2-nano's tokenizer and shapes so small that it runs here.

    96,103 tensors in 125 shards; hidden size 128 in place of 3,072, experts of 64 in place of 1,536, and the rest likewise.
    """
    import shutil

    from inventories import minimax_m2

    sizes, tensors, num_shards = minimax_m2()
    folder = tmp_path_factory.mktemp("small") / "m2"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / name, folder)
    config = tiny.read_json(NANO / "config.json") | sizes
    config |= {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
               "rotary_dim": 16, "attn_type_list": [1] * sizes["num_hidden_layers"]}  # fmt: skip
    tiny.write_json(folder / "config.json", config)
    small = {200064: config["vocab_size"], 3072: 128, 1536: 64, 6144: 96, 1024: 32, 256: 256}

    def shrink(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, 1) if name.endswith("_scale_inv") else tuple(small[size] for size in shape)

    shrunk = [(name, dtype, shrink(name, shape)) for name, dtype, shape in tensors]
    size, weight_map, noise = -(-len(shrunk) // num_shards), {}, np.random.default_rng(0)
    for number in range(num_shards):
        part = shrunk[number * size : (number + 1) * size]
        file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        content = b"".join(noise_in(dtype, shape, noise) for _, dtype, shape in part)
        (folder / file).write_bytes(encode_header(part, metadata={"format": "pt"}) + content)
        weight_map |= {name: file for name, _, _ in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    yield folder
    shutil.rmtree(folder)


def noise_in(dtype: str, shape: tuple[int, ...], noise: np.random.Generator) -> bytes:
    """Finite numbers in the bytes of a dtype, as large as a model's that runs: its norms, its weights or their scales."""
    count = int(np.prod(shape))
    if dtype == "F8_E4M3":  # with a cleared high bit of the exponent they are below 2, and none is NaN
        return bytes(np.frombuffer(noise.bytes(count), np.uint8) & 0b1011_1111)
    if shape == (1, 1):
        return noise.uniform(0.05, 0.15, count).astype("<f4").tobytes()
    values = noise.uniform(0.5, 1.5, count) if len(shape) == 1 else noise.normal(size=count) * shape[-1] ** -0.5
    wide = values.astype("<f4")
    return wide.tobytes() if dtype == "F32" else (wide.view("<u4") >> 16).astype("<u2").tobytes()


def test_dequantised_and_computed_tensors_come_out_the_same(hub: LoopbackHub, tmp_path: Path, m2_fp8: Path) -> None:
    hub.repos["org/fp8"] = Repo(m2_fp8)
    plan = plans.plan(m2_fp8, criterion="random", keep=6)
    prune(m2_fp8, plan, tmp_path / "reference", dequantize=True)
    prune("org/fp8", plan, tmp_path / "out", dequantize=True)
    assert_same(tmp_path / "out", tmp_path / "reference")


def test_a_source_file_kept_whole_is_held_to_the_hubs_own_digest(hub: LoopbackHub, tmp_path: Path, qwen3: Path) -> None:
    repo = Repo(qwen3)
    hub.repos["org/qwen"] = repo
    plan = plans.plan(qwen3, criterion="random", keep=6)
    whole = next(file for file in Checkpoint.open(qwen3).files if "experts" not in str(
        [i.name for i in Checkpoint.open(qwen3).tensors.values() if i.file == file]) and "gate" not in str(
        [i.name for i in Checkpoint.open(qwen3).tensors.values() if i.file == file]))  # fmt: skip
    repo.hashes[whole] = "0" * 64
    with pytest.raises(HubError, match=rf"{whole} has the SHA-256 [0-9a-f]{{12}}, and the hub lists 000000000000"):
        prune("org/qwen", plan, tmp_path / "out")
    repo.hashes.clear()
    prune("org/qwen", plan, tmp_path / "again")


# --- interruptions


def test_fifty_random_disconnects_are_survived(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan, reference: Path
) -> None:
    chance, dropped = random.Random(7), list[tuple[str, int]]()

    def drop(request: Request) -> Fault | None:
        if (
            request.file.endswith(".safetensors")
            and request.where == "storage"
            and request.stop - request.start
            > 1  # of one byte nothing comes before it breaks, and patience is for another test
            and len(dropped) < 50
            and (request.file, request.start) not in dropped  # where it broke before a byte came
            and chance.random() < 0.4
        ):
            dropped.append((request.file, request.start))
            return f"drop {chance.randrange(request.stop - request.start)}"
        return None

    hub.fault = drop
    manifest = prune("org/nano", plan, tmp_path / "out")
    assert len(dropped) == 50
    assert_same(tmp_path / "out", reference)
    moved = hub.moved["storage"] - (NANO / INDEX).stat().st_size
    print(f"prune m2-nano with 50 disconnects: {moved:,} bytes")
    assert moved <= 1.02 * (manifest.after.bytes + headers_of(NANO))  # what had come before each is not fetched again


def test_a_shard_goes_on_in_its_middle(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", []

    def refuse_later(request: Request) -> Fault | None:
        if request.where == "storage" and request.start > 100_000:
            seen.append(request)
            return (503, {}) if len(seen) > 60 else None
        return None

    hub.fault = refuse_later
    with pytest.raises(HubError, match="did not give model") as caught:
        prune("org/nano", plan, out)
    assert "goes on where it stopped" in str(caught.value.hint)
    assert (out / "reapkit.unfinished.json").exists()
    with pytest.raises(CheckpointError, match="unfinished"):
        Checkpoint.open(out)
    done = sum(map(size_of, (out / "reapkit/landed").glob("*.jsonl")))
    assert done > 5_000_000
    hub.fault = lambda request: None
    hub.forget()
    prune("org/nano", plan, out)
    assert_same(out, reference)
    again = hub.moved["storage"]
    assert again < tiny.read_json(reference / "reapkit.json")["after"]["bytes"] - 0.9 * done


def size_of(log: Path) -> int:
    lines = [line for line in log.read_text().splitlines()[1:] if line.endswith("]")]
    keys = [json.loads(json.loads(line)[0]) for line in lines]
    return sum(stop - start for pieces in keys for start, stop, _ in pieces)


def test_what_landed_and_was_damaged_since_is_fetched_again(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan, reference: Path
) -> None:
    out, seen = tmp_path / "out", []

    def refuse_later(request: Request) -> Fault | None:
        seen.append(request)
        return (500, {}) if len(seen) > 90 and request.where == "storage" else None

    hub.fault = refuse_later
    with pytest.raises(HubError):
        prune("org/nano", plan, out)
    partial = next(out.glob("*.partial"))
    content = bytearray(partial.read_bytes())
    for place in range(len(content) // 3, len(content), 4096):
        content[place] ^= 1
    partial.write_bytes(content)
    hub.fault = lambda request: None
    prune("org/nano", plan, out)
    assert_same(out, reference)


def test_a_killed_prune_goes_on_and_no_token_is_left_anywhere(
    served: LoopbackHub,
    tmp_path: Path,
    plan: PruningPlan,
    reference: Path,
    home: Path,  # noqa: F811
) -> None:
    served.forget()
    served.repos = {"org/nano": Repo(NANO, needs_token=True)}
    plan.save(tmp_path / "plan.json")
    command = [
        sys.executable,
        "-m",
        "reapkit",
        "prune",
        "org/nano",
        str(tmp_path / "plan.json"),
        "-o",
        str(tmp_path / "out"),
        "-v",
    ]

    def slow(request: Request) -> Fault | None:
        if request.where == "storage" and request.start > 100_000:
            time.sleep(0.02)
        return None

    served.fault = slow
    environment = served.environment(home, token=TOKEN)
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    logs = tmp_path / "out/reapkit/landed"
    while time.monotonic() < deadline and sum(map(size_of, logs.glob("*.jsonl"))) < 4_000_000:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    said = running.communicate()[0]
    assert running.returncode == -signal.SIGKILL
    landed = sum(map(size_of, logs.glob("*.jsonl")))
    assert 4_000_000 <= landed < 25_000_000
    served.fault = lambda request: None
    served.forget()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", reference)
    # Headers and fingerprints are read again, and what came from their memory before is not spared twice.
    assert served.moved["storage"] < tiny.read_json(reference / "reapkit.json")["after"]["bytes"] - landed + 1_300_000
    assert TOKEN not in said + done.stdout + done.stderr
    assert_without_token(tmp_path)
    assert served.leaked == []


# --- what goes wrong


Setting = Callable[[LoopbackHub, pytest.MonkeyPatch], Any]


def everywhere(fault: Fault, *where: str) -> Callable[[Request], Fault | None]:
    return lambda request: (
        fault if request.where in where and (not request.file or request.file.endswith(".safetensors")) else None
    )


FAILURES: dict[str, tuple[Callable[[Request], Fault | None], str, str]] = {
    "rate limit": (
        everywhere((429, {"RateLimit": '"resolvers";r=0;t=4000'}), "file"),
        "the hub limits how much is asked of it, and says to wait 4,000 s",
        "it goes on where it stopped",
    ),
    "rate limit of the listing": (
        everywhere((429, {"Retry-After": "4000"}), "api"),
        "the hub limits how much is asked of it for the next 4,000 s",
        "wait, then repeat the command",
    ),
    "no ranges": (
        everywhere("whole", "storage"),
        "the server sends model-00001-of-00003.safetensors whole (10,991,144 bytes) when asked for a part of it: it knows no ranges",
        "hf download",
    ),
    "a page in place of a shard": (
        everywhere("html", "storage"),
        "a web page came in place of model-00001-of-00003.safetensors: a proxy, or a page to log in, stands in front of the hub",
        "HTTPS_PROXY",
    ),
    "a page in place of the hub": (
        everywhere("html", "api", "file"),
        "what answers for org/nano is no hub: a proxy, or a page to log in, stands in front of it",
        "HF_ENDPOINT",
    ),
    "a page in place of the hub's files": (
        everywhere("html", "file"),
        "what answers for model-00001-of-00003.safetensors does not name a commit, so it is no hub",
        "HTTPS_PROXY",
    ),
    "errors without end": (
        everywhere((503, {}), "storage"),
        "org/nano did not give model-00001-of-00003.safetensors in 3 attempts: the server answers 503",
        "it goes on where it stopped",
    ),
    "a dead connection": (
        everywhere("drop 0", "storage"),
        "org/nano did not give model-00001-of-00003.safetensors in 3 attempts: the connection broke",
        "it goes on where it stopped",
    ),
    "signatures that are never valid": (
        everywhere((403, {}), "storage"),
        "did not give model-00001-of-00003.safetensors in 3 attempts: the storage behind the hub answers 403",
        "it goes on where it stopped",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_one_sentence_and_a_way_out(hub: LoopbackHub, name: str) -> None:
    hub.fault, sentence, hint = FAILURES[name]
    error = refuse("org/nano")
    assert sentence in error.message
    assert hint in str(error.hint)


def refuse(source: str, **options: Any) -> ReapkitError:
    with pytest.raises(ReapkitError) as caught:
        Checkpoint.open(source, **options)
    said = caught.value.message + str(caught.value.hint)
    assert "\n" not in said and "Signature" not in said and TOKEN not in said
    return caught.value


@pytest.mark.parametrize(
    ("repo", "token", "sentence", "hint"),
    [
        ({"needs_token": True}, None, "the hub has no repository org/nano, or it is private and there is no token", "hf auth login"),
        ({"needs_token": True}, "hf_wrong", "the hub has no repository org/nano, or it is private and the token does not open it", "log"),
        ({"needs_token": True, "gated": True}, None, "org/nano is gated, and there is no token", "accept its terms"),
        ({"gated": True}, TOKEN, "org/nano is gated, and the account of the token has no access to it", "with that account"),
    ],
)  # fmt: skip
def test_what_may_not_be_read_is_said_with_what_is_missing(
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    repo: dict[str, bool],
    token: str | None,
    sentence: str,
    hint: str,
) -> None:
    hub.repos = {"org/nano": Repo(NANO, **repo)}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refuse("org/nano")
    assert error.message == sentence
    assert hint in str(error.hint)


def test_a_private_repository_opens_with_its_token(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos = {"org/nano": Repo(NANO, needs_token=True)}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert inspect("org/nano").tensors == 1815


def test_names_that_the_hub_does_not_know(hub: LoopbackHub, tmp_path: Path) -> None:
    assert refuse("org/none").message.startswith("the hub has no repository org/none")
    assert refuse("org/na me").message == "'org/na me' is neither a folder here nor a name that the hub knows"
    assert refuse("org/nano", revision="v9").message == "org/nano has no revision v9, or has it no more"
    assert refuse("hub://org/nano@v9").message == "org/nano has no revision v9, or has it no more"
    with pytest.raises(UsageError, match="names one revision and --revision b another"):
        Checkpoint.open("hub://org/nano@a", revision="b")
    for files, hint in (
        ({"config.json": b"{}"}, "safetensors only"),
        ({"config.json": b"{}", "a.bin": b""}, "a.bin is a pickle"),
    ):
        folder = tmp_path / str(len(files))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        hub.repos["org/other"] = Repo(folder)
        error = refuse("org/other")
        assert error.message == f"org/other has neither {INDEX} nor model.safetensors"
        assert hint in str(error.hint)


def test_where_no_hub_can_be_reached_it_says_so(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:  # noqa: F811
    with LoopbackHub({}) as gone:
        connect(monkeypatch, gone, home)
    monkeypatch.setattr(hubs, "WAITS", (0.0, 0.01, 0.01))
    error = refuse("org/nano")
    assert error.message == "the hub cannot be reached (ConnectError)"
    assert "proxies" in str(error.hint)


def test_signatures_that_expire_are_asked_for_anew(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan, reference: Path
) -> None:
    def expire(request: Request) -> Fault | None:
        if request.number % 25 == 0:
            hub.valid_signatures.clear()
            hub.valid_signatures.add(f"used {request.number}")
        return None

    hub.fault = expire
    prune("org/nano", plan, tmp_path / "out")
    assert_same(tmp_path / "out", reference)


def test_a_rate_limit_that_passes_is_waited_for(hub: LoopbackHub) -> None:
    answered: list[int] = []

    def limit(request: Request) -> Fault | None:
        if request.where == "file" and request.file.endswith(".safetensors") and len(answered) < 2:
            answered.append(1)
            return 429, {"RateLimit": '"resolvers";r=0;t=1'}
        return None

    hub.fault = limit
    began = time.monotonic()
    Checkpoint.open("org/nano")
    assert time.monotonic() - began >= 1


# --- observing


def test_observing_reads_each_byte_once_per_wave_and_measures_the_same(
    hub: LoopbackHub, tmp_path: Path, m2_fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from reapkit.modules import StreamedModel, SuspendedForwards
    from reapkit.sources import Disk

    hub.repos["org/fp8"] = Repo(m2_fp8)
    ids = [np.arange(24).reshape(2, 12) % 96 + 1]

    def model(source: str | Path) -> StreamedModel:
        checkpoint = Checkpoint.open(source)
        layout = resolve(checkpoint, ARCHITECTURES)
        return StreamedModel(checkpoint, layout, device=torch.device("cpu"), dtype=torch.float32)

    def run(streamed: StreamedModel, disk: Disk | None) -> list[Any]:
        with SuspendedForwards(streamed, ids) as forwards:
            forwards.run_layers(lambda layer, batch: None, disk=disk)
            return list(forwards.logits())

    wanted = run(model(m2_fp8), None)
    remote = model("org/fp8")
    per_pass = sum(info.nbytes for stage in remote.stages(with_mtp=False) for info in stage)
    head = sum(info.nbytes for info in remote._exit)
    for budget, window, second in ((per_pass, per_pass, 1.0), (3 * per_pass, per_pass, 0.0)):
        with Disk.opened(tmp_path / "weights", budget=budget, window=window) as disk:
            hub.forget()
            first = run(remote, disk)
            once = hub.moved["storage"]
            assert sum(path.stat().st_size for path in (tmp_path / "weights").iterdir()) <= budget
            again = run(remote, disk)
            twice = hub.moved["storage"] - once
        for logits in (first, again):
            assert all(torch.equal(a, b) for a, b in zip(logits, wanted, strict=True))
        assert once == per_pass + head
        assert twice == second * per_pass + head
        assert not (tmp_path / "weights").exists()
    hub.forget()
    assert all(torch.equal(a, b) for a, b in zip(run(remote, None), wanted, strict=True))  # in memory
    assert hub.moved["storage"] == per_pass + head


@pytest.mark.parametrize("model", ["m2_fp8", pytest.param("small_m2", marks=pytest.mark.giant)])
def test_observing_fetches_every_byte_once_per_wave_within_the_disk_budget_and_goes_on(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, request: pytest.FixtureRequest
) -> None:
    import shutil

    from reapkit import observation as observing
    from reapkit.observation import Observation, Run

    monkeypatch.setitem(observing.TOKENS_PER_BATCH, "cpu", 64)
    folder: Path = request.getfixturevalue(model)
    if model == "m2_fp8":
        folder = tiny.add_tokenizer(Path(shutil.copytree(folder, tmp_path / "m2")))
    config = tiny.read_json(folder / "config.json")
    hub.repos["org/m2"] = Repo(folder)
    rows = [{"text": f"def f{number}(x):\n    return x + {number}\n" * 3} for number in range(2)]
    text, out = write_jsonl(tmp_path / "text.jsonl", rows), tmp_path / "statistics.safetensors"

    def observation(source: str | Path, disk_budget: int | None = None) -> Observation:
        run = Run("cpu", "float32", activation_budget=64 * 2 * 4 * config["hidden_size"], disk_budget=disk_budget)
        return Observation(source, [text], run=run, max_length=64, seed=0)

    observation(folder).write(out)
    wanted, before = load_file(out), Statistics.load(out)
    hub.forget()
    remote = observation("org/m2")
    opened, waves = hub.moved["storage"], len(remote.waves)
    window, per_pass = remote._window()
    infos = remote.checkpoint.tensors.values()
    print(f"observe {len(infos):,} small tensors in {len(remote.checkpoint.files)} shards, {sum(i.nbytes for i in infos):,} bytes, "
          f"in {waves} waves: {opened:,} bytes for index, headers and fingerprints, {per_pass:,} for a pass")  # fmt: skip
    assert waves >= 2

    def observe(budget: int) -> tuple[int, int]:
        """What observing within the budget moves, after the statistics are seen to be the same to the bit; and what it should."""
        out.unlink(missing_ok=True)
        remote = observation("org/m2", budget)
        hub.forget()
        with largest(tmp_path / f"{out.name}.unfinished.weights") as held:
            remote.write(out)
        found = load_file(out)
        assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)
        assert Statistics.load(out).source.differing(before.source) is None
        moved, planned = hub.moved["storage"], remote.estimate().moved_bytes
        print(
            f"  with {budget:,} bytes of disk, of which {held():,} were seen in use: {moved:,} bytes, planned {planned:,}"
        )
        assert 0 < held() <= budget
        return moved, planned

    # Two layers and no more: every wave fetches every byte once.
    moved, planned = observe(window)
    assert moved == planned == waves * per_pass
    # The last of them is interrupted in its middle: the others are not repeated.
    reached: list[int] = []

    def refuse_later(request: Request) -> Fault | None:
        if unfinished(out).exists() and Statistics.load(unfinished(out), unfinished=True).finished_batches == waves - 1:
            reached.append(request.number)
        return (503, {}) if len(reached) > config["num_hidden_layers"] // 2 else None

    out.unlink()
    hub.fault = refuse_later
    with pytest.raises(HubError, match="did not give model"):
        observation("org/m2", window).write(out)
    hub.fault = lambda request: None
    moved, _ = observe(window)
    assert moved == per_pass
    if model == "small_m2":  # whose passes take long
        return
    # Half of it may stay from one wave to the next, which is what then is not fetched again.
    moved, planned = observe(window + per_pass // 2)
    assert planned == per_pass + (waves - 1) * (per_pass - per_pass // 2)
    assert planned <= moved <= planned + (waves - 1) * window


@contextmanager
def largest(folder: Path) -> Iterator[Callable[[], int]]:
    """The most bytes that files in a folder took while this lasted, looked at again and again."""
    most, stopped = [0], threading.Event()

    def held() -> int:
        found = 0
        with suppress(OSError):
            for path in folder.iterdir():
                with suppress(OSError):
                    found += path.stat().st_size
        return found

    def look() -> None:
        while not stopped.wait(0.01):
            most[0] = max(most[0], held())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        stopped.set()
        thread.join()


def test_a_disk_budget_that_does_not_hold_two_layers_is_refused_with_the_numbers(tmp_path: Path) -> None:
    from reapkit.sources import Disk

    with (
        pytest.raises(
            UsageError, match="a disk budget of 1,000 bytes is less than the 5,000,000 that two layers take"
        ) as caught,
        Disk.opened(tmp_path / "weights", budget=1000, window=5_000_000),
    ):
        pass
    assert caught.value.hint == "--disk-budget 5MB or more"


def test_observe_through_the_command_line(hub: LoopbackHub, tmp_path: Path) -> None:
    from reapkit.observation import Observation, Run

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{i}(x): return x + {i}"}) + "\n" for i in range(8)))
    found = {}
    for source in ("org/nano", NANO):
        observation = Observation(source, [str(text)], run=Run("cpu"), max_length=64, seed=0)
        observation.write(tmp_path / "statistics.safetensors")
        found[source] = load_file(tmp_path / "statistics.safetensors")
        if source == "org/nano":
            estimate = observation.estimate()
            assert estimate.moved_bytes == sum(
                i.nbytes for stage in observation.model.stages(with_mtp=True) for i in stage
            )
            assert hub.moved["storage"] < 1.04 * NANO_BYTES  # tables and fingerprints beside the layers
            print(f"observe m2-nano in one wave: {hub.moved['storage']:,} bytes of {NANO_BYTES:,}")
    assert found["org/nano"].keys() == found[NANO].keys()
    assert all(np.array_equal(found["org/nano"][name], found[NANO][name]) for name in found[NANO])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == [
        "statistics.safetensors",
        "text.jsonl",
    ]


NANO_BYTES = sum(path.stat().st_size for path in NANO.glob("*.safetensors"))


# --- plans, verification, uploads


def test_a_plan_carries_its_revision_and_another_one_is_refused_with_what_differs(
    hub: LoopbackHub, tmp_path: Path, m2: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(m2, tmp_path / "served"))
    repo = hub.repos["org/m2"] = Repo(folder)
    first = repo.commit
    plan = plans.plan("org/m2", criterion="random", keep=6)
    assert (plan.source.origin, plan.source.revision) == ("org/m2", first)
    prune("org/m2", plan, tmp_path / "first")
    name, tensor = next((n, t) for n, t in tiny.load_tensors(folder).items() if n.endswith("gate.weight"))
    info = Checkpoint.open(folder).tensors[name]
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.start)
        stream.write((tensor + 1).numpy().tobytes())
    # The branch has moved: without --revision the plan's is asked for, and this hub has it no more.
    with pytest.raises(HubError, match=f"org/m2 has no revision {first}"):
        prune("org/m2", plan, tmp_path / "second")
    with pytest.raises(PlanError) as caught:
        prune("org/m2", plan, tmp_path / "second", revision="main")
    assert (
        f"the plan is for org/m2 at {first[:12]}, and this is {repo.commit[:12]}: its fingerprints differ, routers"
        in caught.value.message
    )
    assert "weights" in caught.value.message and str(caught.value.hint).startswith(f"--revision {first}")


def test_verify_reads_what_was_received_unless_it_is_to_be_fetched_again(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan
) -> None:
    out = tmp_path / "out"
    prune("org/nano", plan, out)
    kept = tiny.read_json(out / "reapkit.json")["after"]["bytes"]
    hub.forget()
    found = verify(out)
    assert found.ok and found.against_source and found.num_received == 3
    assert hub.moved["storage"] < 0.05 * kept  # headers and fingerprints
    hub.forget()
    again = verify(out, refetch=True)
    assert again.ok and again.num_received == 0
    assert kept < hub.moved["storage"] - headers_of(NANO) < 1.05 * kept
    hub.forget()
    assert verify(out).ok and not hub.requests  # by now by recorded digests


@pytest.mark.parametrize("refetch", [False, True])
def test_verify_finds_a_flipped_bit_and_experts_in_each_others_place(
    hub: LoopbackHub, tmp_path: Path, plan: PruningPlan, refetch: bool
) -> None:
    out = tmp_path / "out"
    prune("org/nano", plan, out)
    infos = Checkpoint.open(out).tensors
    names = [name for name in infos if re.search(r"layers\.0\..*experts\.[34]\.w1\.weight$", name)]
    first, second = (infos[name] for name in names)
    assert first.file == second.file
    content = bytearray((out / first.file).read_bytes())
    flipped = bytearray(content)
    flipped[first.start + 5] ^= 64
    (out / first.file).write_bytes(flipped)
    problems = verify(out, refetch=refetch).problems
    assert any((repr(names[0]) if refetch else "differs at byte") in problem for problem in problems)
    # Swapped, with a list that was made to agree on the bytes: it still says where they came from.
    content[first.start : first.stop], content[second.start : second.stop] = (
        content[second.start : second.stop], content[first.start : first.stop],
    )  # fmt: skip
    (out / first.file).write_bytes(content)
    relabel(out / "reapkit/landed" / f"{first.file}.jsonl", first, second)
    problems = verify(out, refetch=refetch).problems
    assert len([problem for problem in problems if repr(names[0]) in problem or repr(names[1]) in problem]) == 2


def relabel(log: Path, first: Any, second: Any) -> None:
    """Make the list of what landed say that two tensors came to each other's place, as a writer that errs would have it."""
    import hashlib

    about, *lines = log.read_text().splitlines()
    content = (log.parents[2] / first.file).read_bytes()
    entries = []
    for line in lines:
        pieces = []
        for start, stop, place in json.loads(json.loads(line)[0]):
            borders = sorted(
                {
                    place,
                    place + stop - start,
                    *(b for i in (first, second) for b in (i.start, i.stop) if place < b < place + stop - start),
                }
            )
            for low, high in itertools.pairwise(borders):
                origin = start + low - place
                if first.start <= low < first.stop:
                    origin += second.start - first.start
                elif second.start <= low < second.stop:
                    origin -= second.start - first.start
                pieces.append([origin, origin + high - low, low])
        digest = hashlib.sha256(b"".join(content[c : c + b - a] for a, b, c in pieces)).hexdigest()
        entries.append(json.dumps([json.dumps(pieces), digest]))
    log.write_text("\n".join([about, *entries]) + "\n")


def test_a_plan_is_published_and_taken_from_there(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Path, plan: PruningPlan
) -> None:
    from huggingface_hub import ModelCard

    hub.uploads = tmp_path
    choice = plans.choose(NANO, criterion="random", ratio="0.25")
    dry = publish(choice, "me/plan", dry_run=True)
    assert dry.files.keys() == {"plan.json", "README.md"} and dry.url is None and not hub.requests
    with pytest.raises(HubError, match="the token is wrong, expired or lacks this permission"):
        publish(choice, "me/plan")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = publish(choice, "me/plan", private=True)
    assert done.url == f"{hub.endpoint}/me/plan/commit/{hub.repos['me/plan'].commit}"
    assert hub.posted[-1][1]["visibility"] == "private"
    stored = hub.repos["me/plan"].folder
    # The path to the source stays here.
    assert tiny.read_json(stored / "plan.json")["source"]["origin"] == "m2-nano"
    assert str(NANO) not in (stored / "README.md").read_text()
    assert ModelCard((stored / "README.md").read_text()).data.tags == ["reapkit", "pruning-plan"]
    (stored / "README.md").write_text("mine")
    assert "README.md" not in publish(choice, "me/plan").files
    assert (stored / "README.md").read_text() == "mine"
    prune("org/nano", f"hub://me/plan@{hub.repos['me/plan'].commit}", tmp_path / "out")
    assert_same(tmp_path / "out", reference, plan_named=False)
    hub.repos["me/empty"] = Repo(NANO)
    with pytest.raises(PlanError, match="hub://me/empty holds no plan: neither plan"):
        PruningPlan.load("hub://me/empty")


def test_push_sends_the_checkpoint_and_its_card_without_reapkits_folder(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: PruningPlan
) -> None:
    import shutil

    hub.uploads = tmp_path
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    prune(NANO, plan, tmp_path / "out")
    dry = push(tmp_path / "out", "me/pruned", dry_run=True)
    assert not hub.requests and dry.url is None
    assert not any(name.startswith("reapkit/") for name in dry.files)
    assert {"config.json", INDEX, "reapkit.json", "tokenizer.json"} < dry.files.keys()
    assert any("never verified" in note for note in dry.notes) and any(str(NANO) in note for note in dry.notes)
    done = push(tmp_path / "out", "me/pruned")
    sent = hub.repos["me/pruned"].files
    assert done.files.keys() == dry.files.keys() == sent.keys()
    assert all(path.read_bytes() == (tmp_path / "out" / name).read_bytes() for name, path in sent.items())
    assert inspect("me/pruned").num_experts == 36
    push(tmp_path / "out", "me/pruned", with_reapkit=True)
    assert "reapkit/plan.json" in hub.repos["me/pruned"].files and "reapkit/lock" not in hub.repos["me/pruned"].files
    assert PruningPlan.load("hub://me/pruned").kept == plan.kept
    with pytest.raises(CheckpointError, match="is not a finished output of reapkit"):
        push(NANO, "me/other", dry_run=True)
    shutil.rmtree(tmp_path / "out")


# --- branches that move


def moved_on(tmp_path: Path, m2: Path, hub: LoopbackHub) -> tuple[Path, Callable[[], Repo]]:
    """A repository org/m2 and how its branch moves to other routers; what was can still be had."""
    import shutil

    first = tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path / "first")))
    hub.repos["org/m2"] = Repo(first)

    def move() -> Repo:
        second = Path(shutil.copytree(first, tmp_path / "second"))
        name, tensor = next((n, t) for n, t in tiny.load_tensors(second).items() if n.endswith("gate.weight"))
        info = Checkpoint.open(second).tensors[name]
        with (second / info.file).open("r+b") as stream:
            stream.seek(info.start)
            stream.write((tensor + 1).numpy().tobytes())
        hub.repos["org/m2"] = Repo(second, past=[Repo(first)])
        return hub.repos["org/m2"]

    return first, move


def reapkit(*arguments: object) -> Any:
    """The command line in this process, which the fixtures have connected to the hub."""
    from typer.testing import CliRunner

    from reapkit.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("stage", ["observe", "compress, observing", "compress, writing"])
def test_a_repeated_command_stays_with_the_commit_that_it_began_with(
    hub: LoopbackHub, tmp_path: Path, m2: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, move = moved_on(tmp_path, m2, hub)
    first = hub.repos["org/m2"].commit
    text = write_jsonl(tmp_path / "text.jsonl", text_rows(400))
    out = tmp_path / ("statistics.safetensors" if stage == "observe" else "out")
    sums = out if stage == "observe" else out / "reapkit/statistics.safetensors"

    def arguments(source: object, target: Path) -> list[object]:
        common = [source, "--data", text, "--activation-budget", "2200kB", "--disk-budget", "700kB", "-o", target]
        return ["observe", *common] if stage == "observe" else ["compress", *common, "--ratio", "0.25"]

    with monkeypatch.context() as patched:
        if stage == "compress, writing":
            patched.setattr(shards, "_write_shards", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            hub.fault = lambda request: (503, {}) if unfinished(sums).exists() else None
        begun = reapkit(*arguments("org/m2", out))
        assert begun.exit_code == (130 if stage == "compress, writing" else 1), begun.stderr
    hub.fault = lambda request: None
    second = move().commit
    named = reapkit(*arguments("org/m2", out), "--revision", "main")
    assert named.exit_code == 1
    said = " ".join(named.stderr.split())
    assert f"on org/m2 at {first[:12]}, and this is {second[:12]}: its fingerprints differ, routers" in said
    assert f"--revision {first}, or leave --revision out: it goes on with that" in said
    again = reapkit(*arguments("org/m2", out))
    assert again.exit_code == 0, again.stderr
    assert f"goes on with org/m2 at {first[:12]}, as it began" in again.stderr
    assert Statistics.load(sums).source.revision == first
    assert reapkit(*arguments(folder, tmp_path / "wanted")).exit_code == 0
    if stage == "observe":
        found, wanted = load_file(out), load_file(tmp_path / "wanted")
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    else:
        assert tiny.read_json(out / "reapkit.json")["source"]["revision"] == first
        assert_same(out, tmp_path / "wanted", plan_named=False)
        # Once it is done too: it verifies what is there.
        assert reapkit(*arguments("org/m2", out)).exit_code == 0


def test_an_interrupted_prune_goes_on_at_its_plans_commit_when_the_branch_has_moved(
    hub: LoopbackHub, tmp_path: Path, m2: Path
) -> None:
    folder, move = moved_on(tmp_path, m2, hub)
    plan = plans.plan("org/m2", criterion="random", keep=6)
    prune(folder, replace(plan, source=replace(plan.source, origin=str(folder), revision=None)), tmp_path / "wanted")
    written: list[int] = []

    def refuse_later(request: Request) -> Fault | None:
        written.extend([1] if request.start > 8_000 else [])
        return (503, {}) if len(written) > 20 and request.where == "storage" else None

    hub.fault = refuse_later
    with pytest.raises(HubError, match="did not give model"):
        prune("org/m2", plan, tmp_path / "out")
    hub.fault = lambda request: None
    move()
    with pytest.raises(PlanError, match=r"and this is .* its fingerprints differ, routers"):
        prune("org/m2", plan, tmp_path / "out", revision="main")
    manifest = prune("org/m2", plan, tmp_path / "out")
    assert manifest.source.revision == plan.source.revision
    assert_same(tmp_path / "out", tmp_path / "wanted", plan_named=False)
    assert verify(tmp_path / "out").ok


def test_a_commit_that_is_gone_and_whose_weights_are_not_can_be_pruned_from_a_folder(
    hub: LoopbackHub, tmp_path: Path, m2: Path
) -> None:
    from huggingface_hub import snapshot_download

    folder, _ = moved_on(tmp_path, m2, hub)
    plan = plans.plan("org/m2", criterion="random", keep=6)
    (folder / "README.md").write_text("# Another card, and a history that was squashed\n")
    with pytest.raises(HubError, match=f"org/m2 has no revision {plan.source.revision}, or has it no more"):
        prune("org/m2", plan, tmp_path / "out")
    with pytest.raises(PlanError, match=r"and this is .*: all fingerprints are the same") as caught:
        prune("org/m2", plan, tmp_path / "out", revision="main")
    assert "the folder of a download is held to fingerprints alone" in str(caught.value.hint)
    prune(snapshot_download("org/m2"), plan, tmp_path / "out")
    assert verify(tmp_path / "out", source=folder).ok


def test_an_endpoint_that_gives_files_of_another_commit_is_not_believed(hub: LoopbackHub) -> None:
    repo = hub.repos["org/nano"]
    repo.stated = "f" * 40
    error = refuse("org/nano")
    assert error.message == f"LICENSE has moved: the hub gives it at another commit than {repo.commit[:12]}"
    assert "HF_ENDPOINT" in str(error.hint)
    repo.stated = None
    checkpoint = Checkpoint.open("org/nano")
    assert checkpoint.remote is not None
    info = next(iter(checkpoint.tensors.values()))
    size = f"{(NANO / info.file).stat().st_size:,}"
    repo.stated = "f" * 40
    with pytest.raises(HubError) as caught:
        Remote(checkpoint.remote.repository, checkpoint.path).read_into(info.file, 0, memoryview(bytearray(8)))
    assert caught.value.message == (
        f"{info.file} has moved: the hub gives it at ffffffffffff with {size} bytes, and {repo.commit[:12]} with {size} was asked for"
    )
    assert "does not keep commits" in str(caught.value.hint)


# --- ranges


def test_joining_ranges_wastes_no_more_than_its_share_and_cutting_loses_nothing() -> None:
    chance = random.Random(3)
    for _ in range(200):
        borders = sorted(chance.sample(range(5_000_000), 2 * chance.randrange(1, 40)))
        spans = list(zip(borders[::2], borders[1::2], strict=True))
        wanted = sum(stop - start for start, stop in spans)
        result = joined(spans)
        moved = sum(stop - start for start, stop in cut(result))
        assert wanted <= moved <= (1 + WASTE) * wanted
        assert all(any(first <= start and stop <= last for first, last in result) for start, stop in spans)


def test_only_a_hub_address_carries_a_revision() -> None:
    assert hubs.parse("org/name") == ("org/name", None)
    assert hubs.parse("hub://org/name") == ("org/name", None)
    assert hubs.parse("hub://org/name@v1") == ("org/name", "v1")
    assert hubs.parse("org/na@me") == ("org/na@me", None)


def test_the_environment_of_other_tests_is_left_alone() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
