"""How much memory is free, from the files of made-up systems and in a real control group, and what is said where it is too little."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import disturbances
from disturbances import MODEL
from reapkit import observation as module
from reapkit.errors import ResourceError
from reapkit.memory import free_host_memory, free_memory
from reapkit.modules import SuspendedForwards
from reapkit.observation import ACTIVATIONS, Observation, Run
from reapkit.ranks import Ranks
from reapkit.statistics import Statistics

GB = 10**9


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", f"MemTotal: 64000000 kB\nMemAvailable: {32 * GB // 1024} kB\n")
    return tmp_path


def group(root: Path, folder: str, *, limit: str, used: int, cached: int = 0) -> None:
    """A control group of the second version."""
    write(root, f"{folder}/memory.max", f"{limit}\n")
    write(root, f"{folder}/memory.current", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"anon 5\ninactive_file {cached}\n")


def test_without_groups_it_is_what_the_system_calls_available(root: Path) -> None:
    assert free_host_memory(root) == 32 * GB // 1024 * 1024


def test_a_limit_of_the_own_group_counts_and_cached_pages_are_free(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/jobs/7\n")
    group(root, "sys/fs/cgroup/jobs/7", limit=str(8 * GB), used=3 * GB, cached=1 * GB)
    assert free_host_memory(root) == 6 * GB


def test_a_limit_of_a_group_around_it_counts_too(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/jobs/7\n")
    group(root, "sys/fs/cgroup/jobs/7", limit="max", used=3 * GB)
    group(root, "sys/fs/cgroup/jobs", limit=str(4 * GB), used=3 * GB)
    assert free_host_memory(root) == 1 * GB


def test_in_a_container_the_mount_itself_is_the_group(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    group(root, "sys/fs/cgroup", limit=str(2 * GB), used=1 * GB)
    assert free_host_memory(root) == 1 * GB


def test_the_first_version_of_control_groups_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/jobs/7\n0::/\n")
    folder = "sys/fs/cgroup/memory/jobs/7"
    write(root, f"{folder}/memory.limit_in_bytes", f"{8 * GB}\n")
    write(root, f"{folder}/memory.usage_in_bytes", f"{5 * GB}\n")
    write(root, f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {GB}\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n")
    write(root, "sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0\n")
    assert free_host_memory(root) == 4 * GB


def test_another_system_has_some_memory(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) > 0


def test_this_machine_has_memory_left() -> None:
    assert free_memory(torch.device("cpu")) > 1 << 20


# ---- too little


def observation(data: Path, budget: int | None) -> Observation:
    return Observation(MODEL, [str(data)], run=Run("cpu", "float32", budget), max_length=512, seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disturbances.small_text(tmp_path_factory.mktemp("text") / "text.jsonl", 48)


def test_too_little_memory_is_said_with_its_parts_and_the_budget_that_fits(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS_PER_BATCH, "cpu", 512)
    planned = observation(data, 1 << 30)
    memory = planned.memory()
    free = sum(memory.values()) - memory[ACTIVATIONS] // 3
    monkeypatch.setattr(module, "free_memory", lambda device: free)
    with pytest.raises(ResourceError) as caught:
        planned.run()
    assert caught.value.message == (
        f"observing takes {sum(memory.values()) / 1e9:,.2f} GB on cpu, and {free / 1e9:,.2f} GB are free: "
        + ", ".join(f"{size / 1e9:,.2f} GB for {part}" for part, size in memory.items())
    )
    budget = re.fullmatch(r"--activation-budget (\d+)MB", str(caught.value.hint))
    assert budget is not None
    smaller = observation(data, int(budget[1]) * 1_000_000)
    smaller.require_memory()
    assert len(smaller.waves) > len(planned.waves)


def test_memory_for_less_than_one_micro_batch_has_no_budget_that_fits(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = observation(data, 1 << 30)
    monkeypatch.setattr(module, "free_memory", lambda device: 1 << 20)
    with pytest.raises(ResourceError) as caught:
        planned.run()
    assert caught.value.hint == "free some memory, or run where there is more: one layer and one micro-batch must fit"


def test_ranks_on_one_host_share_its_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = observation(data, 1 << 30)
    needed = sum(alone.memory().values())
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * needed - 2)
    alone.require_memory()
    alone.ranks = Ranks(0, 4, 0, 2)  # two hosts, two ranks on each
    with pytest.raises(ResourceError, match=rf"and {(needed - 1) / 1e9:,.2f} GB are free"):
        alone.require_memory()
    alone.place = "host"
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * alone.held_bytes - 2)
    with pytest.raises(ResourceError, match="suspended activations take"):
        alone.require_memory()


def test_the_default_budget_of_a_rank_is_a_share_of_what_its_own_layers_leave(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = observation(data, 1 << 30).model
    monkeypatch.setattr(module, "free_memory", lambda device: GB)
    for sharing in (1, 2):
        left = GB // sharing - 2 * model.layer_nbytes
        assert module.default_budget(model, sharing=sharing) == int(left * module.BUDGET_SHARE["cpu"])


def test_models_side_by_side_leave_what_two_layers_of_each_do(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = observation(data, 1 << 30).model, observation(data, 1 << 30).model
    monkeypatch.setattr(module, "free_memory", lambda device: GB)
    left = GB - 2 * one.layer_nbytes - 2 * other.layer_nbytes
    assert module.default_budget(one, other) == int(left * module.BUDGET_SHARE["cpu"])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "the memory of cpu",
        ),
        (MemoryError(), "the memory of cpu ran out: observing was to take "),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory of cpu ran out"),
    ],
    ids=["main memory", "Python", "a device"],
)
def test_what_runs_out_during_the_run_is_named_with_a_smaller_budget(
    data: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def run_out(self: SuspendedForwards, after: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(SuspendedForwards, "run_layers", run_out)
    planned = observation(data, 1 << 30)
    with pytest.raises(ResourceError, match=sentence) as caught:
        planned.run()
    half = planned.memory()[ACTIVATIONS] // 2_000_000
    assert caught.value.hint == f"repeat the command with --activation-budget {half}MB: it goes on where it stopped"


def test_another_error_of_torch_is_left_as_it_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SuspendedForwards, after: object, **options: object) -> None:
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr(SuspendedForwards, "run_layers", fail)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        observation(data, 1 << 30).run()


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group of this machine, of either version, which limits whoever joins it."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        folder = parent / f"reapkit-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / limit).exists():
                (folder / limit).write_text(str(LIMIT))
                yield folder
                return
        except PermissionError:
            pass
        finally:
            folder.rmdir()
    pytest.skip("needs the right to make a control group")


LIMIT = 150_000_000


def join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def test_a_limit_of_a_real_control_group_is_seen_before_it_kills(limited: Path, data: Path, tmp_path: Path) -> None:
    """The process is let in once it has everything imported; observing 48 rows takes more than the group has."""
    out = tmp_path / "s.safetensors"
    words = ["observe", str(MODEL), "--data", str(data), "--device", "cpu", "-o", str(out)]
    ended = disturbances.run(words, tmp_path / "said", prepare=partial(join, limited))
    assert ended.code == 1, ended
    match = re.search(
        r"error: observing takes ([\d.]+) GB on cpu, and ([\d.]+) GB are free: .* for two layers", ended.said
    )
    assert match is not None, ended.said
    assert float(match[2]) * 1e9 < LIMIT and float(match[2]) < float(match[1])
    assert not out.exists()


def hold_address_space(extra: int) -> None:
    torch.set_num_threads(1)  # OpenMP itself ends a process that it cannot start a thread in
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_address_space_that_runs_out_during_the_run_is_one_sentence_and_the_command_goes_on(
    data: Path, tmp_path: Path
) -> None:
    """A limit that nobody can see beforehand (`ulimit -v`)."""
    out = tmp_path / "s.safetensors"
    words = ["observe", str(MODEL), "--data", str(data), "--device", "cpu", "-o", str(out)]
    ended = disturbances.run(words, tmp_path / "said", prepare=partial(hold_address_space, 150_000_000))
    assert ended.code == 1 and "Traceback" not in ended.said, ended
    # Which of the two comes first is the system's to say: a thread's stack and heap take address space as well.
    assert len(re.findall("^error: (?:the memory of cpu ran out|no more threads can be)", ended.said, re.M)) == 1, ended
    assert "--activation-budget" in ended.said
    assert not list(tmp_path.glob("s.safetensors*"))
    assert disturbances.run(words, tmp_path / "said").code == 0
    assert Statistics.load(out).num_tokens > 0
