"""A real browser for the tests of the page."""

import os
import shutil

import pytest
from demo.serving import PageServer

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One chromium for all tests, whose profile keeps the compiled scripts of the page: half of a page's cost."""
    if CHROMIUM is None and "CI" not in os.environ:
        pytest.skip("no chromium: apt-get install chromium fonts-noto-color-emoji")
    assert CHROMIUM, "CI needs chromium: apt-get install chromium fonts-noto-color-emoji"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=ARGUMENTS)
        yield context.browser
        context.close()


@pytest.fixture(scope="session")
def page_server():
    """One process for the pages of all tests."""
    with PageServer() as server:
        yield server
