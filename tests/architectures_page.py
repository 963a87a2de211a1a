"""Write docs/architectures.md from the table of families and the results of their tests: `architectures_page.py families.xml`.

`make docs` runs the tests and this; a test holds the page to the code.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from families import FAMILIES
from reapkit.architectures import ARCHITECTURES, described

PAGE = Path(__file__).parents[1] / "docs/architectures.md"
HEAD = """# Architectures

This page is written by `make docs` from reapkit's table of families and the results of their tests: do not edit it by hand.

Each family has a tiny checkpoint, built by transformers and written with the vendor's tensor names in shards that experts straddle.
It goes through the checks listed below the table. {passed} of {total} checks pass{skipped}. Real checkpoints of these families have not
been run here: their layouts come from the loaders of transformers and vLLM and from published inventories.

`observe` and `prune` say what works. A release that transformers has no class for is pruned by a plan made elsewhere. What can
be observed can be merged, but for Llama-4. [Every on-disk format](formats.md) can be pruned, and those that reapkit can compute with
observed, whatever the family. MTP layers that have experts are measured where transformers can run them, and otherwise pruned with
the kept set of the last decoder layer or of one that `--mtp` names; `--mtp drop` removes them.

`reroute` says whether the criterion of that name can be used: whether the family's selection rule can be restricted to kept experts
without touching other tokens. The rule is held to the model's own choices whenever it is observed, and in the checks to a masked router.

| family | `model_type` | routing | observe | prune | reroute | MTP experts | checks passed |
|---|---|---|---|---|---|---|---|
"""


@dataclass
class Results:
    """Checks of one tiny checkpoint: passed, all, and why those that were skipped were."""

    passed: int = 0
    total: int = 0
    skipped: list[str] = field(default_factory=list)


def read(path: Path) -> tuple[dict[str, Results], dict[str, int]]:
    """Results by the tiny checkpoint's name, and how many passed by check, from pytest's XML report."""
    by_family: dict[str, Results] = defaultdict(Results)
    by_check: dict[str, int] = defaultdict(int)
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"(test_\w+)\[(.+)\]", case.get("name", ""))
        if match is None:
            continue
        result = by_family[match[2]]
        result.total += 1
        reasons = [entry.get("message", "") for entry in case.findall("skipped")]
        if reasons:
            result.skipped += reasons
        elif case.find("failure") is None and case.find("error") is None:
            result.passed += 1
            by_check[match[1]] += 1
    return dict(by_family), dict(by_check)


def render(by_family: Mapping[str, Results], by_check: Mapping[str, int]) -> str:
    """The page."""
    passed, total = (sum(getattr(result, name) for result in by_family.values()) for name in ("passed", "total"))
    skipped = sum(len(result.skipped) for result in by_family.values())
    text = HEAD.format(passed=passed, total=total, skipped=f", {skipped} cannot be made" if skipped else "")
    notes: dict[str, list[str]] = defaultdict(list)
    for entry in ARCHITECTURES:
        row = described(entry)
        mine = [by_family[family.name] for family in FAMILIES if family.architecture is entry]
        counts = f"{sum(result.passed for result in mine)} of {sum(result.total for result in mine)}" if mine else "-"
        types = ", ".join(f"`{name}`" for name in entry.model_types)
        cells = (entry.name, types, row["routing"], row["observe"], row["prune"], row["reroute"], row["mtp"], counts)
        text += f"| {' | '.join(cells)} |\n"
        for reason in {reason for result in mine for reason in result.skipped}:
            notes[reason].append(entry.name)
        if row["note"]:
            notes[row["note"]].append(entry.name)
    text += "\n## Notes\n\n" + "".join(f"- {', '.join(names)}: {note}.\n" for note, names in sorted(notes.items()))
    text += "\n## Checks\n\n| check | families that pass |\n|---|---|\n"
    for name, count in sorted(by_check.items()):
        text += f"| {name.removeprefix('test_').replace('_', ' ')} | {count} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(render(*read(Path(sys.argv[1]))), encoding="utf-8")
