"""What the site needs beyond this folder: the README as its first page, and the files elsewhere in the repository that pages link to.

Pages are written to be read in the repository too, where a link leads out of this folder (`../models/…`); in the site such a file lies
beside the pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
HOME, CHINESE_HOME = "README.md", "README.zh-CN.md"
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and every file that a page links to outside this folder."""
    files.append(File.generated(config, "index.md", content=_from_root((ROOT / HOME).read_text(encoding="utf-8"))))
    chinese = ROOT / CHINESE_HOME
    files.append(File.generated(config, CHINESE_HOME, content=_from_root(chinese.read_text(encoding="utf-8"))))
    pages = [ROOT / HOME, chinese, *sorted((ROOT / "docs").glob("*.md"))]
    known: set[str] = set()
    while pages:
        page = pages.pop()
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            target = (page.parent / match["target"]).resolve()
            name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
            if not target.is_file() or not name or name.startswith("docs/") or name in {*known, HOME, CHINESE_HOME}:
                continue
            known.add(name)
            files.append(File.generated(config, name, abs_src_path=str(target)))
            if target.suffix == ".md":
                pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that lead out of the documentation's folder, or back into it, into links inside the site."""
    folder = Path(page.file.src_uri).parent

    def inside(match: re.Match[str]) -> str:
        target = match["target"]
        inner = (ROOT / folder / target).resolve() if str(folder) != "." else (ROOT / "docs" / target).resolve()
        if not inner.is_relative_to(ROOT) or not inner.exists():
            return target
        name = inner.relative_to(ROOT).as_posix().removeprefix("docs/")
        return "../" * len(folder.parts) + {HOME: "index.md"}.get(name, name)

    return LINK.sub(inside, markdown)


def _from_root(text: str) -> str:
    """The same page as if it stood in this folder."""
    return LINK.sub(
        lambda match: (
            match["target"].removeprefix("docs/") if match["target"].startswith("docs/") else f"../{match['target']}"
        ),
        text,
    )
