"""Put the counts of a full run of `make torture` into docs/reliability.md, and into out/torture.json.

python tests/reliability_page.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
REPORTS, SUMMARY = ROOT / "out/torture", ROOT / "out/torture.json"
BEGIN, END = "<!-- counts of make torture -->", "<!-- end of counts -->"


def gather(reports: Path) -> dict[str, dict[str, Any]]:
    """Every test's counts, parts added up; `calls`, which all parts share, once. Soak and fuzzing have files of their own."""
    tests: dict[str, Counter[str]] = {}
    alone: dict[str, dict[str, Any]] = {}
    for path in sorted(reports.glob("*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if "test" not in figures:
            alone[path.stem] = figures
            continue
        counts = tests.setdefault(figures["test"], Counter())
        calls = figures.get("calls", 0)
        counts.update({name: value for name, value in figures.items() if name not in ("name", "test", "calls")})
        counts["calls"] = max(counts["calls"], calls)
    return {**{name: dict(counts) for name, counts in tests.items()}, **alone}


def render(counts: dict[str, dict[str, Any]]) -> str:
    """The lines between the two marks."""
    lines = ["| what | counts |", "|---|---|"]
    for name in sorted(name for name in counts if name != "soak"):
        figures = ", ".join(
            f"{value:,} {key.replace('_', ' ')}"
            for key, value in counts[name].items()
            if isinstance(value, int) and value
        )
        lines.append(f"| {name} | {figures} |")
    if (soak := counts.get("soak")) is not None:
        memory, files = soak["resident_bytes"], soak["open_files"]
        lines.append(
            f"| soak of {soak['minutes']:g} minutes | {soak['rounds']:,} rounds, {soak['runs'].get('killed', 0):,} kills, "
            f"{soak['wrong_outputs']:,} wrong outputs; resident memory {memory['first'] / 1e6:,.0f} MB after warming up, "
            f"{memory['last'] / 1e6:,.0f} MB at the end; open files {files['first']}, {files['last']} |"
        )
    return "\n".join(lines)


def main() -> None:
    counts = gather(REPORTS)
    SUMMARY.write_text(json.dumps(counts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(text), "the page has no place for the counts"
    PAGE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{render(counts)}\n{END}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
