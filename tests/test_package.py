"""The package outside its repository, and what the repository promises about itself."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_builds_and_runs_without_the_repository(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "reapkit/py.typed" in names and "reapkit/cli.py" in names
    assert {f"reapkit/templates/report.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert all(name.startswith(("reapkit/", "reapkit-")) for name in names)
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import reapkit; print(reapkit.__file__)\n"
        "from reapkit.cli import main; sys.argv = ['reapkit', 'list', 'criteria', '--json']; main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert shown.stdout.startswith(str(target)) and '"reap"' in shown.stdout


def test_every_exported_name_exists() -> None:
    import reapkit

    for name in reapkit.__all__:
        assert getattr(reapkit, name).__doc__, name
