"""What the tests of the page do in a browser."""

from __future__ import annotations

import re
import time
from urllib.parse import urlsplit

STATES = "states => JSON.stringify([...document.querySelectorAll('.ml-card')].map(c => c.dataset.state)) === states"


class Visits:
    """Opens pages at an address; `close` fails if anything went wrong in the browser or left this machine."""

    def __init__(self, browser, address, columns=3):
        self.browser, self.address, self.columns = browser, address, columns
        self.contexts, self.tabs, self.troubles, self.hosts = [], [], [], set()

    def __call__(self, path="", width=1280, height=800, scheme="light", wait=True, own=False, **settings):
        """Open a page; `wait` until all parts of the comparison page are there.

        Up to two pages at a time are tabs of the one profile, where a page keeps nothing that another could find; more
        would wait for each other's connections. The others, phones, those with `settings` and those that are to be on
        their `own` get a context each, where nothing is cached.
        """
        profile = self.browser.contexts[0]
        if own or settings or width < 500 or len(profile.pages) > 2:  # the first is the window's empty one
            context = self.browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 500, **settings
            )
            self.contexts.append(context)
            page = context.new_page()
        else:
            page = profile.new_page()
            self.tabs.append(page)
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=scheme)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: self.troubles.append(message.text) if serious_message(message) else None)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        page.goto(self.address + path)
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        if wait:
            page.wait_for_function(
                "least => document.querySelectorAll('.ml-card[data-kind]').length >= least", arg=self.columns
            )
            for name in ("#ml-prompt textarea", "#ml-run", "#ml-stop", ".ml-chip >> nth=1", ".ml-switch", ".ml-kept"):
                page.wait_for_selector(name, state="attached")  # each arrives on its own
        return page

    def close(self):
        """Close all pages, and check."""
        for opened in (*self.tabs, *self.contexts):
            opened.close()
        self.browser.contexts[0].clear_permissions()
        assert self.troubles == []
        assert self.hosts <= {"127.0.0.1", None}  # None: data: and blob: addresses


def serious_message(message):
    """Whether a line in the console is an error, except Gradio's own about the stream of a page that was left."""
    of_leaving = ("AbortError: signal is aborted", "Unexpected error Connection errored out")
    return message.type == "error" and not message.text.startswith(of_leaving)


def ask(page, prompt):
    """Type a prompt, press Enter, and wait until the columns are new."""
    page.fill("#ml-prompt textarea", prompt)
    begun(page, lambda: page.press("#ml-prompt textarea", "Enter"))


def begun(page, act):
    """Do something that starts a comparison, and wait until the columns are new."""
    page.evaluate("window.earlier = document.querySelector('.ml-card')")
    act()
    page.wait_for_function("document.querySelector('.ml-card') !== window.earlier")


def wait_for_states(page, *states):
    """Wait until the columns are in these states."""
    page.wait_for_function(STATES, arg=str(list(states)).replace("'", '"').replace(" ", ""))


def wait_until_writing(page):
    """Wait until every column has some text."""
    page.wait_for_function("[...document.querySelectorAll('.ml-text')].every(text => text.textContent.length > 3)")


def texts(page):
    """Return the columns' answers."""
    return page.locator(".ml-text").all_text_contents()


def names(page):
    """Return the columns' names."""
    return page.locator(".ml-name").all_inner_texts()


def words(page):
    """Return the line that is read aloud."""
    return page.locator(".ml-words").inner_text()


def wait_for_words(page, start):
    """Wait until that line starts so."""
    page.wait_for_function("start => document.querySelector('.ml-words').textContent.startsWith(start)", arg=start)


def open_panel(page, name):
    """Open a panel, unless it is open."""
    button = page.get_by_role("button", name=re.compile(f"^{name}"))
    if "open" not in (button.get_attribute("class") or ""):
        button.click()


def set_number(page, name, value):
    """Type a number into a setting, and see its slider follow."""
    slider = page.get_by_label(f"range slider for {name}")
    for _ in range(20):  # what is typed while the panel is still opening is lost
        page.get_by_label(f"number input for {name}").fill(value)
        page.keyboard.press("Tab")
        page.wait_for_timeout(200)
        if slider.input_value() == value:
            return
    raise AssertionError(f"{name} stays at {slider.input_value()}")


def settled(server):
    """Assert that the engine computes nothing."""
    time.sleep(0.15)  # the step that runs
    before = server.forwards()
    time.sleep(0.6)
    assert server.forwards() == before


def shift(page):
    """Return the layout shift since the page began to load: the sum of all scores, also of those after an input."""
    return page.evaluate("""() => {
        const observer = new PerformanceObserver(() => {});
        observer.observe({type: "layout-shift", buffered: true});
        return observer.takeRecords().reduce((sum, entry) => sum + entry.value, 0);
    }""")


def violations(page):
    """Return everything that axe-core finds, each with the elements that it names."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return {one["id"]: [node["html"][:200] for node in one["nodes"]] for one in found}


def luminance(color):
    """Relative luminance of a CSS colour, as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrasts(page, *more):
    """Contrast ratios of the visible texts, and of `more` selectors, against what lies behind them."""
    selectors = (
        ".ml-head h1, .ml-head p, .ml-words, .ml-name, .ml-facts, .ml-answer, .ml-state, .ml-numbers dt, .ml-numbers dd"
    )
    pairs = page.evaluate(
        """names => names.split(", ").map(name => {
            const element = document.querySelector(name);
            let behind = element;
            while (/, 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
            return [name, getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        })""",
        ", ".join((selectors, ".ml-badge, #ml-prompt textarea, .ml-chip, #ml-run, #ml-stop", *more)),
    )
    for name, front, back in pairs:
        light, dark = sorted((luminance(front), luminance(back)), reverse=True)
        yield name, (light + 0.05) / (dark + 0.05)
