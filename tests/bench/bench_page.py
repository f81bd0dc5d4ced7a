"""How the page feels: until it can be used, until the first tokens are there, and with many visitors at once.

    python tests/bench/bench_page.py [--rounds 5] [--visitors 16] [--base embedded] [--json FILE]

A server of its own with the shipped adapters, chromium as the visitor; needs a machine that does nothing else.

usable      from the server's start, after its imports and with the models loaded, until the page can be typed into
first token from the click on Run until every column shows text, seen in the page
visitors    gradio clients that ask at once: each one's time as a multiple of its fair share, which is the time that one
            alone takes times their number; and the time until each has its first token, and one in every column
newcomer    one more beside all the others, who ask again and again in another process
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PROMPT = "Write this in digits: seven thousand, eight hundred and ten"
NEW = "{}: write this number in words, then in digits, and the next one"  # no visitor reads what another has read
TOKENS = 24


def serve(base: str, port: int, ready) -> None:
    """The server's process: tells when imports and models are through, then builds the page and serves it."""
    from minilora_hub.compare.engine import CompareEngine
    from minilora_hub.compare.found_adapters import shipped_adapters
    from minilora_hub.demo.ui.app import build_demo, launch

    engine = CompareEngine(base, shipped_adapters())
    ready.put(time.time())
    launch(build_demo(engine), host="127.0.0.1", port=port)


def usable_seconds(page, address: str, began: float) -> float:
    """Open the page as soon as there is one, and wait until it can be typed into.

    A browser that is refused renders a page of its own, which many times a second would take a core from the server.
    """
    url = urlsplit(address)
    while True:
        try:
            socket.create_connection((url.hostname, url.port)).close()
            break
        except OSError:
            time.sleep(0.05)
    page.goto(address)
    page.wait_for_selector("#ml-prompt textarea")
    page.wait_for_selector("#ml-run:not([disabled])")
    page.fill("#ml-prompt textarea", "x")
    return time.time() - began


def first_token_seconds(page, rounds: int) -> list[float]:
    """Click Run, and watch the page itself for text in every column; the first run warms up."""
    taken = []
    watch = """() => new Promise(done => {
        const began = performance.now();
        const look = () => {
            const cards = [...document.querySelectorAll('.ml-card')].filter(card => card.offsetParent !== null);
            const texts = cards.map(card => card.querySelector('.ml-text').textContent.length);
            const run = cards.every(card => card.dataset.state !== 'idle');
            if (run && texts.length && texts.every(length => length > 0)) done((performance.now() - began) / 1000);
            else requestAnimationFrame(look);
        };
        document.querySelector('#ml-run').click();
        // The run before leaves its text until this one begins.
        const cleared = () => [...document.querySelectorAll('.ml-text')].every(text => !text.textContent.length)
            ? look() : requestAnimationFrame(cleared);
        cleared();
    })"""
    for _ in range(rounds + 1):
        page.fill("#ml-prompt textarea", PROMPT)
        taken.append(page.evaluate(watch))
        page.wait_for_selector(".ml-status[data-phase=done]", timeout=120_000)
    return taken[1:]


def client_of(address: str):
    """A visitor who is not a browser."""
    from gradio_client import Client

    return Client(address, verbose=False)


def ask(client, number: int, into: list[tuple[float, float, float]], start: threading.Barrier | None = None) -> None:
    """One visitor: seconds to the first token, to one in every column, and to the end."""
    if start is not None:
        start.wait()
    began, seconds = time.perf_counter(), {}
    for item in client.submit(NEW.format(number), max_new_tokens=TOKENS, api_name="/compare"):
        for some in (any, all):
            if some(row["tokens"] for row in item["rows"]):
                seconds.setdefault(some, time.perf_counter() - began)
    assert all(row["error"] is None for row in item["rows"])
    into.append((seconds[any], seconds[all], time.perf_counter() - began))


def many(address: str, visitors: int) -> dict:
    """All at once, against one alone."""
    alone: list[tuple[float, float, float]] = []
    clients = [client_of(address) for _ in range(visitors)]
    for number in range(3):
        ask(clients[0], 1001 + number, alone)
    together: list[tuple[float, float, float]] = []
    start = threading.Barrier(visitors)
    threads = [
        threading.Thread(target=ask, args=(client, 2001 + 7 * index, together, start))
        for index, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one = statistics.median(end for *_, end in alone)
    return {
        "visitors": visitors,
        "served": len(together),
        "seconds_alone": one,
        "longest_as_fair_shares": max(end for *_, end in together) / (visitors * one),
        "first_token_median": statistics.median(first for first, *_ in together),
        "first_token_longest": max(first for first, *_ in together),
        "all_columns_median": statistics.median(every for _, every, _ in together),
        "all_columns_longest": max(every for _, every, _ in together),
    }


def ask_again(address: str, visitors: int) -> None:
    """Visitors who ask for ever."""

    def again(first: int) -> None:
        client = client_of(address)
        for number in range(first, first + 1000):
            ask(client, number, [])

    threads = [threading.Thread(target=again, args=(10_000 * (index + 1),)) for index in range(visitors)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)  # so that they don't ask in step
    for thread in threads:
        thread.join()


def newcomer(context, address: str, others: int, rounds: int) -> dict:
    """Seconds until one more visitor's first tokens."""
    busy = context.Process(target=ask_again, args=(address, others), daemon=True)
    busy.start()
    taken: list[tuple[float, float, float]] = []
    try:
        client = client_of(address)
        time.sleep(20)  # until all of them generate
        for number in range(rounds):
            ask(client, 5001 + 7 * number, taken)
            time.sleep(1)
    finally:
        busy.terminate()
        busy.join()
    names = ("first_token_s", "all_columns_s")
    return {"others": others} | {
        name: {"median": statistics.median(all_), "all": all_}
        for name, all_ in zip(names, list(zip(*taken, strict=True))[:2], strict=True)
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--visitors", type=int, default=16)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium: apt-get install chromium fonts-noto-color-emoji")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    server = context.Process(target=serve, args=(options.base, port, ready), daemon=True)
    address = f"http://127.0.0.1:{port}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        server.start()
        try:
            found: dict = {"usable_seconds": usable_seconds(page, address, ready.get())}
            first = first_token_seconds(page, options.rounds)
            found["first_token_seconds"] = {"median": statistics.median(first), "all": first}
            found["many"] = many(address, options.visitors)
            found["newcomer"] = newcomer(context, address, options.visitors - 1, 2 * options.rounds)
        finally:
            server.terminate()
            server.join()
            browser.close()
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
