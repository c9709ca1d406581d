"""A reader's JupyterLab in a real browser: headless Chromium, if this machine has one.

Without a browser nothing here is run, and the report says so: a skip is not a pass.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from playwright.sync_api import Browser, Page, sync_playwright

from flashlib.course.workspace import COPY, PARTS, REPOSITORY, bring_up_to_date

START_SECONDS = 60
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it answers, its secret, and the folder that it shows."""

    port: int
    token: str
    folder: Path

    def url(self, path: str) -> str:
        return f"http://localhost:{self.port}/lab/tree/{path}?token={self.token}&reset"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"NOT RUN: no browser here; install one of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="session")
def lab(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab as `make lab` starts it, over a fresh copy of the course, with a reader in front of it."""
    folder = tmp_path_factory.mktemp("course")
    for part, pattern in PARTS:
        (folder / part).mkdir()
        for source in (REPOSITORY / part).glob(pattern):
            shutil.copy(source, folder / part)
    bring_up_to_date(folder)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        lab = Lab(probe.getsockname()[1], secrets.token_hex(16), folder / COPY)
    environment = {name: value for name, value in os.environ.items() if name != "FLASHLIB_NONINTERACTIVE"}
    environment |= {"FLASHLIB_DATA": str(folder / "data"), "JUPYTER_NO_CONFIG": "1", "OMP_NUM_THREADS": "1"}
    environment |= {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    flags = [
        f"--port={lab.port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.token={lab.token}",
        "--no-browser",
        "--allow-root",
    ]
    flags += [
        f"--ServerApp.root_dir={lab.folder}",
        "--LabApp.extension_manager=readonly",
        "--LabApp.news_url=None",
        "--LabApp.expose_app_in_browser=True",
    ]
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *flags]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(lab, process, folder / "log")
        yield lab
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            one.terminate()
        for survivor in psutil.wait_procs(family, timeout=10)[1]:
            survivor.kill()


def _wait(lab: Lab, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            requests.get(
                f"http://localhost:{lab.port}/api/status", params={"token": lab.token}, timeout=5
            ).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not answer; it said:\n{log.read_text()}")


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    """Chromium, headless."""
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A window of a laptop's size."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    yield page
    page.close()
