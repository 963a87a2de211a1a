"""Several processes observe what one does: their sums are its sums within the rounding of float64."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from reapkit import observation as module
from reapkit.cli import app
from reapkit.errors import ReapkitError, UsageError
from reapkit.observation import Observation, Run
from reapkit.ranks import Ranks
from reapkit.rerouting import Reroute
from reapkit.samples import RoutedSamples, beside
from reapkit.statistics import SUM_NAMES, Statistics
from streaming import text_rows, write_jsonl

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["reapkit.compression", "transformers.models.minimax_m2.modeling_minimax_m2", "test_ranks"]
)
COUNT = 4


def observation(folder: Path, text: str, ranks: Ranks | None = None, reroute: Reroute | None = None) -> Observation:
    module.TOKENS_PER_BATCH["cpu"] = 100
    run = Run(device="cpu", dtype="float32", activation_budget=60_000)
    return Observation(folder, [text], run=run, max_length=48, seed=0, ranks=ranks, reroute=reroute)


def work(folder: Path, text: str, out: Path, environment: dict[str, str], die: bool, reroute: Reroute | None) -> None:
    os.environ |= environment
    seen = observation(folder, text, Ranks.from_environment(), reroute)

    def progress(task: str, done: float, total: float, unit: str) -> None:
        if die and done > total / 2:
            os._exit(9)

    try:
        seen.write(out, progress=progress)
    except ReapkitError as error:
        print(error, error.hint)
        out.with_name(f"error-{seen.ranks.rank}").write_text(f"{error.message}\n{error.hint}")
        os._exit(1)


def start(
    folder: Path,
    text: str,
    out: Path,
    *,
    dying: Sequence[int] = (),
    count: int = COUNT,
    reroute: Reroute | None = None,
    apart: bool = False,
) -> list[int | None]:
    """Observe with so many ranks, each with a folder of its own where they are `apart`; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        place = out.parent / f"host-{rank}" / out.name if apart else out
        child = CONTEXT.Process(target=work, args=(folder, text, place, shared | own, rank in dying, reroute))
        child.start()
        children.append(child)
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


@pytest.fixture(scope="module")
def model(m2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.add_tokenizer(Path(shutil.copytree(m2, tmp_path_factory.mktemp("ranks") / "m2")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", text_rows(60))


def require_close(one: Statistics, other: Statistics) -> None:
    assert (one.source, one.domains, one.calibration) == (other.source, other.domains, other.calibration)
    for index, layer in one.layers.items():
        theirs = other.layers[index]
        assert np.array_equal(layer.count_SE, theirs.count_SE) and np.array_equal(layer.tokens_S, theirs.tokens_S)
        assert np.array_equal(layer.max_norm_E, theirs.max_norm_E)
        for name in SUM_NAMES:
            assert np.allclose(getattr(layer, name), getattr(theirs, name), rtol=1e-13, atol=0)


def test_four_ranks_observe_what_one_process_does_and_go_on_when_one_has_died(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 100)
    alone = observation(model, text).run()
    out = tmp_path / "out/statistics"
    codes = start(model, text, out, dying=[2])
    assert codes[2] == 9 and [codes[rank] for rank in (0, 1, 3)] == [1, 1, 1]
    for rank in (0, 1, 3):
        message, hint = (out.parent / f"error-{rank}").read_text().splitlines()
        assert message.startswith(f"rank {rank} of 4 lost the others: ")
        assert hint == "start them again with the same command: each rank goes on after its last finished wave"
    assert not out.exists()
    kept = sorted(path.name for path in out.parent.glob("*.unfinished"))
    assert kept == [f"statistics.rank-{rank}-of-4.unfinished" for rank in (0, 1, 2, 3)]
    whole = Statistics.load(out.parent / kept[0], unfinished=True)
    assert whole.finished_batches == whole.batches, "a rank that was done keeps its share"
    assert start(model, text, out) == [0, 0, 0, 0]
    require_close(alone, Statistics.load(out))
    assert sorted(path.name for path in out.parent.iterdir()) == ["error-0", "error-1", "error-3", "statistics"]


def test_two_ranks_fill_one_sample_and_do_not_go_on_without_what_one_of_them_wrote(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 100)
    reroute = Reroute(tokens=300, candidates=4)
    alone, out = tmp_path / "alone.safetensors", tmp_path / "out/s.safetensors"
    observation(model, text, reroute=reroute).write(alone)
    assert start(model, text, out, count=2, reroute=reroute, dying=[0]) == [9, 1]
    sums = [Path(f"{out}.rank-{rank}-of-2.unfinished") for rank in range(2)]
    sums[0].unlink()  # as if it had died in its first wave
    lost = Path(f"{beside(out)}.unfinished")
    lost.rename(tmp_path / "moved away")
    assert start(model, text, out, count=2, reroute=reroute) == [1, 1]
    for rank in range(2):
        message, hint = (out.parent / f"error-{rank}").read_text().splitlines()
        assert message == (
            f"{sums[1]}: sums of an interrupted run, and the sample of tokens that belongs to them is missing"
        )
        assert hint == f"remove {sums[1]} to begin again"
    assert not lost.exists() and not beside(out).exists()
    (tmp_path / "moved away").rename(lost)
    assert start(model, text, out, count=2, reroute=reroute) == [0, 0]
    require_close(Statistics.load(alone), Statistics.load(out))
    wanted, found = RoutedSamples.open(beside(alone)), RoutedSamples.open(beside(out))
    assert wanted.header == found.header
    for index in wanted.layers:
        one, other = wanted.layer(index), found.layer(index)
        assert len(one) == len(other) == 300 and np.array_equal(one.expert_TC, other.expert_TC)
        np.testing.assert_allclose(one.gram_TU, other.gram_TU, rtol=1e-4, atol=1e-5)


def test_ranks_that_see_no_common_folder_do_not_begin_a_sample(model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    assert start(model, text, out, count=2, reroute=Reroute(tokens=300, candidates=4), apart=True) == [1, 1]
    for rank in range(2):
        (error,) = (tmp_path / f"host-{rank}").iterdir()
        message, hint = error.read_text().splitlines()
        assert message == (
            "all ranks fill s.reroute.safetensors, and rank 1 of 2 cannot see the folder that rank 0 writes to"
        )
        assert hint == "give a folder that all hosts share with -o, or sample on one host alone"


def test_shares_are_every_item_once() -> None:
    shares = [Ranks(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert all(
        Ranks(rank, 3).number(place) == item for rank, share in enumerate(shares) for place, item in enumerate(share)
    )


def test_what_torchrun_says_is_taken_and_half_of_it_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks.from_environment() == Ranks(0, 1, 0, 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="names a rank without all of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE"):
        Ranks.from_environment()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Ranks.from_environment() == Ranks(3, 8, 1, 2)


def test_more_processes_than_micro_batches_are_refused(model: Path, tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", text_rows(1))
    with pytest.raises(UsageError, match="the text is too short for 64 processes"):
        observation(model, short, Ranks(63, 64, 63, 64))


def test_compress_is_for_one_process(model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    arguments = ["compress", str(model), "--data", text, "--ratio", "0.25", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "compress runs in one process" in result.stderr
