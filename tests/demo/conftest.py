"""A real browser for the tests of the page."""

import os
import shutil

import pytest
from demo.browsing import Visits
from demo.serving import PageServer

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.votes import VoteStore

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


@pytest.fixture(scope="module")
def engine(saved):
    """A tiny random base and two adapters, whose tokens depend on all that is before them."""
    base, adapters = saved
    return CompareEngine(base, adapters[:2], device="cpu")


@pytest.fixture
def ana(engine, tmp_path):
    return Visitors(Runner(engine), VoteStore(tmp_path / "votes"), SharedComparisons(tmp_path / "shared")).of("ana")


@pytest.fixture(scope="module")
def server(page_server):
    return page_server.serve("scripted")


@pytest.fixture
def visit(server, browser):
    visits = Visits(browser, server.address)
    yield visits
    visits.close()


@pytest.fixture(scope="module")
def page(server, browser):
    """One page for the tests that need no page of their own."""
    visits = Visits(browser, server.address)
    yield visits()
    visits.close()
