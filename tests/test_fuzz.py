"""Whatever a file from a stranger holds, reading it ends in a result or in a ReapkitError.

The cases of the corpus are those that did not, each until it was mended. benchmarks/fuzz.py draws many more from the same targets.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzzing
from reapkit.errors import ReapkitError

# Loading a tokenizer takes a hundred times as long as reading a header.
SLOW = {"tokenizer", "tokenizer-config", "chat-template"}
FAST = sorted(fuzzing.TARGETS.keys() - SLOW)

# Odd, and nothing that has to be refused: a model's own arguments may be broken and stay text, and a tensor may be called anything.
TAKEN = {"arguments nested beyond any stack", "a tensor whose name is a pattern that matches itself"}

Make = Callable[[str], fuzzing.Target]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Targets by name, each made once."""
    made: dict[str, fuzzing.Target] = {}

    def make(name: str) -> fuzzing.Target:
        if name not in made:
            made[name] = fuzzing.TARGETS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.mark.parametrize("name", sorted(fuzzing.TARGETS))
def test_whole_files_are_read_to_the_end(target: Make, name: str) -> None:
    refused = []
    for seed in target(name).seeds:
        try:
            target(name).run(seed)
        except ReapkitError as error:
            refused.append(error.message)
    assert all("holds images, and only text is read" in message for message in refused), (
        "the cases start from broken files"
    )
    assert len(refused) <= 1


@pytest.mark.parametrize(
    ("name", "what"), [(path.stem, what) for path in sorted(fuzzing.CORPUS.glob("*.json")) for what in fuzzing.corpus(path.stem)]
)  # fmt: skip
def test_a_case_that_once_got_through_is_refused(target: Make, name: str, what: str) -> None:
    content = fuzzing.corpus(name)[what]
    if what in TAKEN:
        target(name).run(content)
        return
    with pytest.raises(ReapkitError) as caught:
        target(name).run(content)
    assert len(caught.value.message) < 5_000


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(chance=st.randoms(use_true_random=False))
def test_a_changed_file_brings_no_error_but_reapkits_own(target: Make, name: str, chance: random.Random) -> None:
    content = target(name).case(chance)
    with contextlib.suppress(ReapkitError):
        target(name).run(content)


@pytest.mark.parametrize("name", [*FAST, *sorted(SLOW)])
def test_numbered_cases_bring_no_error_but_reapkits_own(target: Make, name: str) -> None:
    refused = 0
    for _, content in target(name).cases(0, 40 if name in SLOW else 300):
        try:
            target(name).run(content)
        except ReapkitError:
            refused += 1
    assert refused, "the changes do no harm"


@pytest.mark.parametrize("name", ["header", "index", "config", "statistics", "rows", "rows-parquet"])
def test_numbered_cases_are_the_same_ones_in_every_run(target: Make, name: str, tmp_path: Path) -> None:
    again = fuzzing.TARGETS[name](tmp_path)
    assert list(target(name).cases(7, 12)) == list(again.cases(7, 12))
