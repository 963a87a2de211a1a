"""Every command in the documentation works: those on the bundled model are run, the others must at least be understood."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import fuzzing
import reapkit
import test_families
from architectures_page import PAGE, Results, render
from families import FAMILIES
from reapkit.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:console|sh|bash)?\n(.*?)^```|((?:^    .*\n)+)", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `reapkit` command in the page's code blocks; lines ending in a backslash are joined."""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        for line in (match[1] or match[2]).replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"reapkit [a-z]", line):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_is_understood(page: Path) -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page):
        assert words[1] in verbs, words
        known = {option for parameter in verbs[words[1]].params for option in parameter.opts}
        for word in words[2:]:
            if word == "--":
                break
            if word.startswith("-") and len(word) > 1:
                assert word.partition("=")[0] in known, words


# Their commands are those of the pages in English, as another test holds.
TRANSLATED = {
    ROOT / "README.zh-CN.md": ROOT / "README.md",
    ROOT / "docs/quick-start.zh-CN.md": ROOT / "docs/quick-start.md",
}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TRANSLATED], ids=lambda page: page.name)
def test_every_documented_command_on_the_bundled_model_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [words for words in commands(page) if any("m2-nano" in word for word in words)]
    if not chosen:
        pytest.skip("the page has no command on the bundled model")
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    for words in chosen:
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, (words, result.stderr)


def test_the_python_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "pruned/reapkit.json").exists()


@pytest.mark.parametrize(("chinese", "english"), TRANSLATED.items(), ids=lambda page: page.name)
def test_a_translation_has_the_commands_numbers_and_links_of_the_page_in_english(chinese: Path, english: Path) -> None:
    def code(page: Path) -> list[str]:
        blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        return [line.partition(" # ")[0].rstrip() for block in blocks for line in block.splitlines()]

    def numbers(page: Path) -> Counter[str]:
        return Counter(re.findall(r"\d+(?:[.,]\d+)*", page.read_text(encoding="utf-8")))

    def words(page: Path) -> Counter[str]:
        return Counter(
            re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S))
        )

    def links(page: Path) -> Counter[str]:
        found = Counter(re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")))
        return Counter({link: count for link, count in found.items() if link not in ("README.md", "README.zh-CN.md")})

    assert code(chinese) == code(english) and code(english)
    assert numbers(chinese) == numbers(english)
    assert words(chinese) == words(english)
    assert links(chinese) == links(english)


def test_the_site_is_built_with_every_link_leading_somewhere(tmp_path: Path) -> None:
    """mkdocs in its strict mode: an unknown page, link, anchor or Python name is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for page in ("index.html", "quick-start/index.html", "README.zh-CN/index.html", "models/m2-nano/index.html"):
        assert (tmp_path / "site" / page).is_file(), page
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for name in ("compress", "report", "PruningPlan", "LayerStatistics"):
        assert re.search(rf'id="reapkit\.\w+\.{name}"', api), name
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"""<(?:script|img|link)\b[^>]*\b(?:src|href)="(https?:)?//""", page.read_text(encoding="utf-8")
        )
        assert not loaded, page


def test_every_exported_name_is_on_the_page_of_functions() -> None:
    listed = re.findall(r"^::: reapkit\.(\w+)\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert not {(home, name) for name, home in reapkit._HOMES.items()} - set(listed)


def test_the_screenshots_are_small() -> None:
    pictures = list((ROOT / "docs/pictures").glob("*.webp"))
    assert len(pictures) == 2 and sum(picture.stat().st_size for picture in pictures) < 300_000


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(
            r"^```.*?^```|^    [^\n]*|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        )
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)


def test_the_page_of_architectures_is_what_make_docs_writes() -> None:
    """Rows and notes are the code's; the counts in it are of as many checks as there are, and all but those with a reason pass."""
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        match[1]: (int(match[2]), int(match[3]))
        for match in re.finditer(r"^\| ([^|]+) \|.*\| (\d+) of (\d+) \|$", text, re.M)
    }
    by_check = {
        match[1].replace(" ", "_"): int(match[2]) for match in re.finditer(r"^\| ([a-z0-9 ]+) \| (\d+) \|$", text, re.M)
    }
    functions = [name for name in vars(test_families) if name.startswith("test_")]
    assert by_check.keys() == {name.removeprefix("test_") for name in functions}
    of_mtp = [name for name in functions if "mtp" in name]
    by_family, passing = {}, dict.fromkeys(by_check, 0)
    for family in FAMILIES:
        reasons = {"loads_with_no_missing": family.cannot_load} if family.cannot_load else {}
        if family.runs_mtp:
            reasons["mtp_layers_that_are_not_run"] = test_families.RUNS_MTP
        elif family.has_mtp:
            reasons["mtp_layers_that_transformers_can_run"] = test_families.CANNOT_RUN_MTP
        if refused := test_families.REFUSED.get(family.name):
            reasons["rerouted_errors"] = test_families.REFUSAL.format(refused)
        wanted = [name for name in functions if family.has_mtp or name not in of_mtp]
        passed = [name for name in wanted if not any(part in name for part in reasons)]
        for name in passed:
            passing[name.removeprefix("test_")] += 1
        by_family[family.name] = Results(len(passed), len(wanted), list(reasons.values()))
    assert by_check == passing
    assert text == render(by_family, {f"test_{name}": count for name, count in by_check.items()}), "run make docs"
    assert len(rows) == len({family.architecture.name for family in FAMILIES})


def test_the_diffs_in_the_guide_to_adding_an_architecture_are_what_the_code_says() -> None:
    text = (ROOT / "docs/adding-an-architecture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```diff\n--- a/(\S+)\n\+\+\+ b/\1\n@@\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for file, lines in blocks:
        added = "".join(f"{line.removeprefix('+')}\n" for line in lines.splitlines())
        assert added in (ROOT / file).read_text(encoding="utf-8"), file
    for line in re.findall(r"^(_\w+ = Slot\(.*?\))  #", text, re.MULTILINE):
        assert line in (ROOT / "src/reapkit/architectures.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/reliability.md", "SECURITY.md"])
def test_the_tests_that_hold_what_can_be_relied_on_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    files = set(re.findall(r"`(test_\w+\.py)", text))
    assert len(files) > 5
    sources = {file: (ROOT / "tests" / file).read_text(encoding="utf-8") for file in files}
    for cell in re.findall(r"\| ([^|]*test_[^|]*) \|$", text, re.MULTILINE):
        file = ""
        for named, name in re.findall(r"(test_\w+\.py)|\b(test_\w+)", cell):
            file = named or file
            assert not name or f"def {name}" in sources[file], (file, name)


def test_the_table_of_fuzzed_files_is_that_of_the_recorded_run() -> None:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks/fuzz.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = json.loads((ROOT / "benchmarks/fuzz.json").read_text(encoding="utf-8"))
    assert results.keys() == fuzzing.TARGETS.keys()
    assert benchmark.table(results) in (ROOT / "docs/reliability.md").read_text(encoding="utf-8"), (
        "python benchmarks/fuzz.py --table benchmarks/fuzz.json"
    )
    assert sum(result["crashes"] for result in results.values()) == 0
