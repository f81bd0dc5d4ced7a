"""Record the pictures of the page in README.md and docs/page.md, from runs of the shipped adapters.

Run in the repository's root, on a quiet machine::

    PYTHONPATH=tests python tests/demo/record_pictures.py
"""

from __future__ import annotations

import io
import shutil
import time
from itertools import pairwise
from pathlib import Path

from demo.conftest import ARGUMENTS
from demo.serving import PageServer
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

OUT = Path("spaces/compare")
CLIP, SECONDS = (1280, 800), 10.0
SCALE = 0.75
LARGEST_CLIP = 2_000_000
DONE = "document.querySelector('.ml-status').dataset.phase === 'done'"


def opened(browser: Browser, address: str, width: int, height: int, scheme: str) -> Page:
    """Open the page, and wait until all of it is there."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 500, reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    for name in (".ml-token", ".ml-chip", ".ml-switch"):
        page.wait_for_selector(name)
    return page


def choose(page: Page, label: str) -> None:
    """Choose an example, and see its run begin."""
    page.evaluate("window.earlier = document.querySelector('.ml-card')")
    page.get_by_role("button", name=label).first.click()
    page.wait_for_function("document.querySelector('.ml-card') !== window.earlier")


def record(page: Page) -> list[tuple[float, Image.Image]]:
    """Choose an example and then a token; return the pictures of `SECONDS`, each with its time."""
    frames: list[tuple[float, Image.Image]] = []
    began = time.perf_counter()
    chosen = False
    while (now := time.perf_counter() - began) < SECONDS:
        picture = Image.open(io.BytesIO(page.screenshot(type="jpeg", quality=92)))
        size = round(picture.width * SCALE), round(picture.height * SCALE)
        frames.append((now, picture.resize(size, Image.Resampling.LANCZOS)))
        if len(frames) == 4:
            choose(page, "Number")
        if not chosen and page.evaluate(DONE) and now > SECONDS - 3.5:
            chosen = True
            page.locator(".ml-card").nth(3).locator(".ml-token").nth(3).click()
    return frames


def save_clip(frames: list[tuple[float, Image.Image]], file: Path) -> None:
    """Write an animated WebP that plays as long as it was recorded, and is small enough for a README."""
    times = [now for now, _ in frames] + [SECONDS]
    durations = [round(1000 * (after - before)) for before, after in pairwise(times)]
    first, *rest = (picture for _, picture in frames)
    for quality in (80, 65, 50, 35):
        first.save(file, save_all=True, append_images=rest, duration=durations, loop=0, quality=quality, method=4)
        if file.stat().st_size < LARGEST_CLIP:
            print(f"{file}: {len(frames)} pictures, {file.stat().st_size / 1e6:.2f} MB at quality {quality}")
            return
    raise SystemExit(f"{file}: larger than {LARGEST_CLIP} bytes")


def main() -> None:
    """Serve the page, and record."""
    with PageServer(OMP_NUM_THREADS="2") as server, sync_playwright() as playwright:
        address = server.serve("shipped").address
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = opened(browser, address, *CLIP, "light")
        choose(page, "Number")  # the first run is slower
        page.wait_for_function(DONE)
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)  # the colours of buttons change slowly
        page.screenshot(path=OUT / "page.png")
        save_clip(record(page), OUT / "run.webp")
        page = opened(browser, address, 1280, 800, "dark")
        choose(page, "JSON")
        page.wait_for_function(DONE)
        page.get_by_role("button", name="by task").click()
        page.locator(".ml-kept").scroll_into_view_if_needed()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        page.screenshot(path=OUT / "experts.png")
        page = opened(browser, address, 390, 844, "light")
        page.locator(".ml-tab").nth(3).click()
        page.wait_for_selector(".ml-tab:nth-child(4)[aria-current=true]")
        page.screenshot(path=OUT / "phone.png")
        browser.close()


if __name__ == "__main__":
    main()
