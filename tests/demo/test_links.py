"""The page opened by a card's "try it" link: ?adapter=owner/name, against the HTTP Hub, in a real browser."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from demo.browsing import Visits, ask, contrasts, names, open_panel, texts, wait_for_states
from hub.server import HubServer
from processes import free_port
from tiny_stand_ins import save_base_and_adapters

pytestmark = pytest.mark.slow  # a browser for minutes; test_page.py has the short look

TESTS = Path(__file__).parents[1]
MARKER = "minilora_remote_code_ran"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny base and an adapter of each kind, all naming org/base."""
    folder = tmp_path_factory.mktemp("models")
    base, adapters = save_base_and_adapters(folder)
    for path in (*folder.glob("*/config.json"), *folder.glob("*/adapter_config.json")):
        config = json.loads(path.read_text())
        if "base_model_name_or_path" in config:
            path.write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    return base, {path.name: path for path in adapters}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def published(hub, models):
    """The adapters in public repos, and repos that must not be shown."""
    base, folders = models
    hub.add_repo("org/base", files={path.name: path.read_bytes() for path in base.iterdir()})

    def files(name):
        return {path.name: path.read_bytes() for path in folders[name].iterdir() if path.is_file()}

    def changed(name, file, **fields):
        before = files(name)
        return before | {file: json.dumps(json.loads(before[file]) | fields).encode()}

    code = f"import os\nopen(os.environ['{MARKER}'], 'w').write('ran')\n".encode()
    evil = {name: code + data if name.endswith(".py") else data for name, data in files("mix").items()}
    pickled = {name: data for name, data in files("dora").items() if not name.endswith(".safetensors")}
    repos = {
        "dora": files("dora"),
        "mixlora": files("mix"),
        "evil": evil | {"__init__.py": code, "sitecustomize.py": code},
        "pickle": pickled | {"adapter_model.bin": b"\x80\x04cos\nsystem\n(S'true'\ntR."},
        "large": files("dora") | {"adapter_model.safetensors": bytes(123_456)},
        "damaged": files("dora") | {"adapter_model.safetensors": files("dora")["adapter_model.safetensors"][:-9]},
        "other-base": changed("dora", "config.json", base_model_name_or_path="org/other", base_fingerprint="unknown"),
        "other-weights": changed("dora", "config.json", base_fingerprint="sha256:" + "0" * 64),
        "slow-regex": changed("dora", "config.json", rank_pattern={"(a+)+$": 4}),
        "lora": files("lora"),
        "pissa": changed("lora", "adapter_config.json", init_lora_weights="pissa"),
        "imports": changed("lora", "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity"),
        "no-adapter": {"README.md": b"nothing"},
    }
    for name, base in (("dora", "org/base"), ("mixlora", "org/base"), ("other-base", "org/other")):
        card = f"---\nbase_model: {base}\nbase_model_relation: adapter\n---\n"
        repos[name] = repos[name] | {"README.md": card.encode()}
    for name, content in repos.items():
        hub.add_repo(f"ana/{name}", files=content)
    hub.add_repo("ana/private", files=files("dora"), private=True)
    return repos


class Page:
    """tests/demo/linked_page.py in a process of its own, in a folder where ana/dora is a folder, too."""

    def __init__(self, hub, models, scratch):
        _, folders = models
        shutil.copytree(folders["dora"], scratch / "local" / "dora")
        self.marker = scratch / "ran"
        environment = os.environ | hub.environment(hub.add_user("ana"), scratch / "cache")
        environment |= {"PYTHONPATH": str(TESTS.parent), MARKER: str(self.marker), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(TESTS / "demo" / "linked_page.py"),
                str(free_port()),
                "org/base",
                str(folders["dora"]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=scratch,
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http"), "the page did not start; see its traceback above"

    def ask(self, what):
        """Ask the running page."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return [name for name in self.process.stdout.readline().strip().split(",") if name]

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def link_server(hub, models, published, tmp_path_factory):
    server = Page(hub, models, tmp_path_factory.mktemp("page"))
    yield server
    server.close()


@pytest.fixture
def visit(link_server, browser):
    """Open the page by a link, and wait for its notice."""
    visits = Visits(browser, link_server.address, columns=2)

    def open_page(adapter, phase, *arguments, **settings):
        page = visits(f"?adapter={quote(adapter, safe='')}", *arguments, wait=False, **settings)
        page.wait_for_selector(f".ml-notice[data-phase={phase}]")
        page.wait_for_selector("#ml-prompt textarea")
        return page

    yield open_page
    visits.close()


@pytest.mark.parametrize(("name", "kind"), [("mixlora", "MixLoRA"), ("dora", "DoRA"), ("lora", "LoRA")])
def test_a_link_shows_that_adapter_beside_the_base(visit, models, name, kind):
    """In place of the page's own adapters, answering as it does elsewhere, and not as the base."""
    page = visit(f"ana/{name}", "shown")
    page.wait_for_function("document.querySelectorAll('.ml-card[data-kind]').length === 2")
    assert names(page) == ["base", f"ana/{name}"]
    assert page.locator(".ml-badge").nth(1).inner_text() == kind
    assert page.locator("h1").inner_text() == "Same prompt. Two answers."
    assert page.locator(".ml-memory").inner_text().startswith("The base is in memory once: ")
    assert page.locator(".ml-notice-words").inner_text() == f"This link compares ana/{name} with its base."
    ask(page, "Hello")
    wait_for_states(page, "length", "length")
    from minilora_hub.compare.engine import CompareEngine, Sampling

    base, folders = models
    engine = CompareEngine(base, [folders["mix" if name == "mixlora" else name]], device="cpu")
    expected = ["", ""]
    for update in engine.stream("Hello", Sampling(96)):
        expected[update.row] += update.text
    assert texts(page) == expected
    assert expected[0] != expected[1]
    page.click(".ml-notice-back")
    page.wait_for_function("document.querySelectorAll('.ml-card[data-kind]').length === 2")
    page.wait_for_selector(".ml-notice", state="hidden")
    assert names(page) == ["base", "dora"]


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("ana/gone", "the Hub has no public repo ana/gone"),
        ("ana/damaged", "not a readable safetensors file"),
        ("ana/slow-regex", "rank_pattern: a page reads plain names of modules only"),
        ("../local/dora", "is not an id on the Hub"),
        ("<img src=x onerror=\"document.title='hacked'\">", "is not an id on the Hub"),
    ],
)
def test_a_link_that_cannot_be_followed_gives_a_reason_and_the_page_works(visit, adapter, words):
    """One message, as text; the page's own adapters are there and answer."""
    check_refused(visit, adapter, words)


def check_refused(visit, adapter, words):
    page = visit(adapter, "error")
    notice = page.locator(".ml-notice-words").inner_text()
    assert notice.startswith("The adapter of this link is not shown: ")
    assert words in notice
    assert len(notice) < 500
    assert page.title() == "minilora · compare"
    page.wait_for_function("document.querySelectorAll('.ml-card[data-kind]').length === 2")
    assert names(page) == ["base", "dora"]
    if adapter in ("ana/damaged", "/etc"):
        ask(page, "Hello")
        wait_for_states(page, "length", "length")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("ana/private", "the Hub has no public repo ana/private"),
        ("ana/pickle", "has no adapter_model.safetensors"),
        ("ana/no-adapter", "has no adapter_model.safetensors"),
        (
            "ana/large",
            "of ana/large is 0.1 MB; from a link this page downloads at most 0.1 MB",
        ),
        ("ana/other-base", "ana/other-base is for 'org/other', but this page runs 'org/base'"),
        ("ana/other-weights", "was trained on other weights of org/base than this page runs"),
        ("ana/pissa", "changes the base's own weights"),
        ("ana/imports", "megatron_config makes PEFT import the module"),
        ("local/dora", "the Hub has no public repo local/dora"),
        ("/etc", "is not an id on the Hub"),
        ("embedded", "is not an id on the Hub"),
        ("", "is not an id on the Hub"),
        ("ana/../dora", "is not an id on the Hub"),
        ("https://example.org/a", "is not an id on the Hub"),
        ("a/" + "b" * 5000, "is not an id on the Hub"),
    ],
)
def test_all_links_that_cannot_be_followed(visit, adapter, words):
    check_refused(visit, adapter, words)


def test_code_of_an_adapter_never_runs(visit, link_server):
    """The repo's Python files are not even fetched; the installed classes answer."""
    page = visit("ana/evil", "shown")
    ask(page, "Hello")
    wait_for_states(page, "length", "length")
    assert not link_server.marker.exists()
    assert link_server.ask("modules") == []


def test_code_is_not_fetched(hub, visit):
    """Only what is read crosses the network, and no token goes along."""
    start = len(hub.requests)
    visit("ana/mixlora", "shown")
    visit("ana/dora", "shown")
    visit("ana/evil", "shown")
    asked = [record for record in hub.requests[start:] if "/resolve/" in record.path]
    assert asked
    assert not [record.path for record in asked if record.path.endswith((".py", ".bin"))]
    assert {record.user for record in hub.requests if "ana/" in record.path} == {None}
    assert {record.user for record in hub.requests if "org/base" in record.path} == {"ana"}


def test_few_adapters_are_kept_and_the_least_recently_used_goes(hub, visit, link_server):
    """The limit here is two; a visitor who still has the third open gets a reason."""
    first = visit("ana/dora", "shown")
    visit("ana/mixlora", "shown")
    first.reload()
    first.wait_for_selector(".ml-notice[data-phase=shown]")
    visit("ana/evil", "shown")
    assert set(link_server.ask("kept")) == {"ana/dora", "ana/evil"}
    start = len(hub.requests)
    visit("ana/dora", "shown")
    assert len(hub.requests) == start
    second = visit("ana/mixlora", "shown")
    visit("ana/evil", "shown")
    assert set(link_server.ask("kept")) == {"ana/mixlora", "ana/evil"}
    ask(first, "Hello")
    first.wait_for_selector(".ml-status[data-phase=error]")
    assert "ana/dora is no longer in memory" in first.locator(".ml-words").inner_text()
    ask(second, "Hello")
    wait_for_states(second, "length", "length")


def test_adapters_are_added_removed_and_taken_home_in_place(visit):
    """Found on the Hub by base, added with one click, removed at their column; and the ways to use one elsewhere."""
    page = visit("ana/dora", "shown")
    page.wait_for_function("document.querySelectorAll('.ml-card[data-kind]').length === 2")
    assert page.locator(".ml-remove").nth(1).is_hidden()  # the last one stays
    page.click(".ml-add")
    page.fill("[name=hub]", "mix")
    page.click(".ml-search")
    page.wait_for_function("document.querySelectorAll('.ml-found li').length === 1")
    page.fill("[name=hub]", "")
    page.click(".ml-search")
    page.wait_for_function("document.querySelectorAll('.ml-found li').length === 2")
    assert page.locator(".ml-picker-words").inner_text() == "2 public adapters of org/base on the Hub."
    page.get_by_role("button", name="Add ana/mixlora").click()
    page.wait_for_function("document.querySelectorAll('.ml-card[data-kind]').length === 3")
    assert names(page) == ["base", "ana/dora", "ana/mixlora"]
    page.get_by_role("button", name="Get ana/mixlora").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading").all_inner_texts() == [
        "Get ana/mixlora", "transformers", "vLLM, with minilora_hub as its plugin",
        "minilora serve, for OpenAI's clients", "download",
    ]  # fmt: skip
    code, vllm, serve, pull = dialog.locator("pre").all_inner_texts()
    assert 'repo, revision = "ana/mixlora", "' in code
    assert "--lora-modules mixlora=ana/mixlora" in vllm
    assert "minilora serve ana/mixlora --base org/base" in serve
    assert pull.startswith("minilora pull ana/mixlora --revision ")
    assert dialog.get_by_role("link").get_attribute("href").endswith("/ana/mixlora")
    dialog.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Remove ana/dora").click()
    page.wait_for_function("document.querySelectorAll('.ml-card[data-kind]').length === 2")
    assert names(page) == ["base", "ana/mixlora"]
    ask(page, "Hello")
    wait_for_states(page, "length", "length")


def test_the_picker_takes_ids_of_the_hub(visit):
    """Beside the page's own; each with a card; a wrong one gives a reason, and the columns stay."""
    page = visit("ana/dora", "shown")
    open_panel(page, "Adapters")
    page.wait_for_function("document.querySelectorAll('.ml-adapter').length === 2")
    assert page.locator(".ml-pick input:checked").evaluate_all("all => all.map(one => one.value)") == ["ana/dora"]
    for name, words in (
        ("ana/private", "the Hub has no public repo ana/private"),
        ("/etc/passwd", "is not an id on the Hub"),
    ):
        page.fill("[name=hub]", name)
        page.click(".ml-strong:visible")
        page.wait_for_selector(".ml-picker[data-phase=error]")
        page.wait_for_function(
            "words => document.querySelector('.ml-picker-words').textContent.includes(words)", arg=words
        )
        assert names(page) == ["base", "ana/dora"]
    page.locator(".ml-pick input[value=dora]").check()
    page.fill("[name=hub]", "ana/mixlora")
    page.click(".ml-strong:visible")
    page.wait_for_selector(".ml-picker[data-phase=done]")
    page.wait_for_function("document.querySelectorAll('.ml-card').length === 4")
    assert names(page) == ["base", "dora", "ana/dora", "ana/mixlora"]
    card = page.locator(".ml-adapter", has_text="ana/mixlora")
    assert "rank 4, 4 experts, 2 active" in card.inner_text()
    assert card.get_by_role("link").get_attribute("href").endswith("/ana/mixlora")
    assert page.locator(".ml-notice").is_hidden()
    ask(page, "Hello")
    wait_for_states(page, "length", "length", "length", "length")
    assert len(set(texts(page)[2:])) == 2


@pytest.mark.parametrize(
    ("width", "height", "scheme"),
    [(390, 844, "dark"), (390, 844, "light"), (1280, 800, "dark"), (1280, 800, "light")],
)
def test_the_notice_can_be_read(visit, width, height, scheme):
    """On a desktop and on a phone, in light and in dark: nothing to scroll sideways, contrast of at least 4.5."""
    for adapter, phase in (("ana/dora", "shown"), ("a/" + "b" * 300, "error")):
        page = visit(adapter, phase, width, height, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert {name: ratio for name, ratio in contrasts(page, ".ml-notice-words") if ratio < 4.5} == {}
