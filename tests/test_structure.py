"""The package's floors: what may import what, held by reading the source and nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import reapkit

SOURCE = Path(reapkit.__file__).parent
# A module imports only from lower floors, or from modules listed before it on its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress", "interrupts", "outputs", "tensors", "gpus"),
    (
        "hub",
        "pagecache",
        "sources",
        "checkpoint",
        "quantization",
        "selection",
        "layout",
        "architectures",
        "geometry",
        "dialects",
    ),
    ("figures", "statistics", "criteria", "elimination", "samples", "plans", "recovery", "evidence", "clusters"),
    (
        "calibration",
        "kernels",
        "fusion",
        "formats",
        "neurons",
        "magnitudes",
        "experts",
        "activations",
        "memory",
        "modules",
        "sums",
        "ranks",
        "inventory",
        "capacity",
        "rerouting",
        "observation",
        "similarity",
        "endpoints",
        "behaviour",
        "generation",
        "fidelity",
    ),
    ("serving", "cards", "edits", "landing", "shards", "verification"),
    (
        "compression",
        "merging",
        "publishing",
        "servers",
        "probes",
        "reporting",
        "sandboxed",
        "sandbox",
        "programs",
        "grading",
        "benchmarks",
        "evaluation",
        "cli",
    ),
)
LIGHT_FLOORS = 3  # floors 0 to 2 start at once: the standard library, NumPy and safetensors alone
LIGHT_PACKAGES = {"numpy", "safetensors"}
# The library is imported only when a hub id is given.
LAZY_EXCEPTIONS = {("hub", "huggingface_hub")}
PLACE = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem not in ("__init__", "__main__"))


def imports(name: str) -> Iterator[str]:
    """Every module that a module imports, anywhere in it but for type checkers, by its full name."""
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            assert node.module is not None
            if node.module == "reapkit":
                yield from (f"reapkit.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_module_has_its_place_and_the_documentation_shows_it() -> None:
    assert sorted(PLACE) == MODULES
    page = (Path(__file__).parents[1] / "docs/how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \w+ \| (.*) \|$", page, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", names)) for _, names in rows] == list(FLOORS)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_below(name: str) -> None:
    ours = {part.split(".")[1] for part in imports(name) if part.startswith("reapkit.")}
    assert [other for other in sorted(ours) if other in PLACE and PLACE[other] >= PLACE[name]] == []


@pytest.mark.parametrize("name", [name for name in MODULES if PLACE.get(name, (9, 0))[0] < LIGHT_FLOORS])
def test_the_lower_floors_need_neither_torch_nor_transformers(name: str) -> None:
    outside = {part.split(".")[0] for part in imports(name)} - {"reapkit", *sys.stdlib_module_names, *LIGHT_PACKAGES}
    assert {part for part in outside if (name, part) not in LAZY_EXCEPTIONS} == set()


@pytest.mark.parametrize("name", ["compression", "verification"])
def test_pruning_and_verifying_start_without_torch(name: str) -> None:
    """Torch takes seconds to import and half a gigabyte; what copies and compares bytes needs neither."""
    script = f"import sys, reapkit.{name}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("name", MODULES)
def test_no_pickle_is_ever_loaded(name: str) -> None:
    forbidden = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    assert {part.split(".")[0] for part in imports(name)} & forbidden == set()
    for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            owner, method = node.func.value.id, node.func.attr
            assert not (owner == "torch" and method in ("load", "save")), f"line {node.lineno}"
            if owner in ("np", "numpy") and method == "load":
                assert all(keyword.arg != "allow_pickle" for keyword in node.keywords), f"line {node.lineno}"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("cli", "__main__")])
def test_only_the_command_line_prints_or_exits(name: str) -> None:
    for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "exit", "quit", "sys.exit", "os._exit"), f"line {node.lineno}"
