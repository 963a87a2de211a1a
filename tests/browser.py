"""A headless Chromium for tests of pages; no network, a fresh profile every time."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

DESKTOP, PHONE = (1280, 900), (390, 844)
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
MISSING = [name for name, path in (("chromium", BROWSER), ("chromedriver", DRIVER)) if path is None]
REQUIRED = os.environ.get("REAPKIT_REQUIRE_BROWSER") == "1"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip

needs_browser = pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=f"not installed: {', '.join(MISSING)}")


@contextmanager
def browser() -> Iterator[Page]:
    """One browser for as long as it is needed."""
    assert not MISSING, f"REAPKIT_REQUIRE_BROWSER=1, and not installed: {', '.join(MISSING)}"
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            yield Page(driver)
        finally:
            driver.quit()


class Page:
    """What a test asks of a page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, file: Path, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
        """Show a file at a width and in a colour scheme, and wait until its charts are drawn."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(file.as_uri())
        self.driver.set_script_timeout(60)
        self.driver.execute_async_script(
            "const done = arguments[0]; const look = () => document.documentElement.dataset.drawn === 'yes' || "
            "!document.getElementById('failure').hidden ? requestAnimationFrame(() => done()) : setTimeout(look, 20); look();"
        )

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def messages(self) -> list[str]:
        """What the console got since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def hover(self, chart: str) -> str:
        """What a chart shows when the pointer stands in its middle."""
        self.run(f"document.getElementById('{chart}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.run(
            f"const r = document.querySelector('#{chart} .nsewdrag').getBoundingClientRect(); "
            "return [r.x + r.width / 4, r.y + r.height / 4]"
        )
        for step in (0, 1, 2):
            moved = {"type": "mouseMoved", "x": x + step, "y": y + step}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", moved)
        self.driver.execute_async_script("setTimeout(arguments[0], 200)")
        shown: str = self.run(
            f"return [...document.querySelectorAll('#{chart} .hoverlayer text')].map(t => t.textContent).join(' ')"
        )
        return shown

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(shot["data"]))
