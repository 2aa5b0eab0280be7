"""The explorer's page, made once, and Chromium, the system's own: playwright drives it and downloads nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jforge.explorer import page

sys.path.append(str(Path(__file__).parents[1] / "hf"))  # lens_types and the keys of test_lens_keys
BROWSERS = "chromium", "chromium-browser", "google-chrome"


@pytest.fixture(scope="session")
def file(tmp_path_factory) -> Path:
    """Made by the command, in a process where nothing checks shapes as the tests do."""
    made = tmp_path_factory.mktemp("explorer") / "page.html"
    subprocess.run([sys.executable, "-m", "jforge", "explorer", "--out", str(made)], check=True)
    assert made.stat().st_size < page.LIMIT
    return made


@pytest.fixture(scope="session")
def address(file) -> str:
    return file.as_uri()


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"no browser: one of {', '.join(BROWSERS)} must be installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


@pytest.fixture
def shown(chromium, address):
    """shown(width, scheme, view): the page, which must raise no error, print nothing and ask for nothing else."""
    contexts, trouble = [], []

    def show(width: int = 1440, scheme: str = "light", view: str = ""):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: trouble.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        tab.on("request", lambda request: trouble.append(request.url) if not mine(request.url) else None)
        tab.goto(address + view)
        return tab

    def mine(url: str) -> bool:
        return url.partition("#")[0] == address or url.startswith("data:")

    yield show
    for context in contexts:
        context.close()
    assert trouble == []
