"""How much memory is free, from the files of made-up systems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reapkit.memory import free_host_memory, free_memory

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
