"""The page's view of where measured adapters differ: what it holds, and how it looks and acts in a browser."""

from __future__ import annotations

import json

import pytest
from demo.browsing import Visits, violations, wait_for_states
from demo.measured import ADAPTERS, measured
from tiny_stand_ins import ScriptedBase, byte_tokenizer, save_parrots

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.runs.comparison import Weights
from minilora_hub.demo.runs.measured_answers import SHIPPED, find_measured
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.answer_cache import adapter_digest
from minilora_hub.evaluation.differences import read_measured
from minilora_hub.evaluation.metrics import exact_match
from minilora_hub.evaluation.tasks.registry import TASKS


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    folders = save_parrots(tmp_path_factory.mktemp("parrots"), ADAPTERS)
    return Catalogue(CompareEngine(ScriptedBase(), folders, tokenizer=byte_tokenizer()))


@pytest.fixture
def file(catalogue, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured(catalogue.paths())))
    return path


def test_adapters_are_found_by_their_weights(catalogue, file):
    """Whatever they were called when they were measured."""
    found = find_measured(file, catalogue)
    assert found.names == ["parrot-dora", "parrot-mix"]
    assert found.expected["<b>3</b>?"] == "3!"
    view = found.view({})
    assert (view["names"], view["tasks"], view["difficulties"]) == (["base", *ADAPTERS], ["dates"], [1, 2])
    assert [(group["name"], group["total"]) for group in view["groups"]] == [("parrot-dora", 2), ("parrot-mix", 1)]
    (item,) = view["groups"][1]["items"]
    assert item["prompt"] == "<b>2</b>?"
    assert item["right"] == {"base": False, "parrot-dora": False, "parrot-mix": True}
    assert item["answers"]["base"] == "base 2"
    assert view["routing"] == {
        "parrot-mix": {
            "layer": 2,
            "tasks": [{"task": "Dates", "load": [0.5, 0.5]}, {"task": "Numbers", "load": [0.9, 0.1]}],
        }
    }
    assert view["words"].startswith("6 items: both right 2, only parrot-dora 2, only parrot-mix 1, neither 1")


def test_what_a_visitor_chooses(catalogue, file):
    found = find_measured(file, catalogue)
    view = found.view({"first": "base", "second": "parrot-dora", "task": "dates", "difficulty": 2, "most": 1})
    assert [(group["total"], len(group["items"])) for group in view["groups"]] == [(1, 1), (2, 1)]
    assert view["groups"][1]["items"][0]["prompt"] == "<b>1</b>?"
    assert view["routing"] == {}
    for asked, message in (
        ({"first": "nobody"}, "first='nobody': must be one of base, parrot-dora, parrot-mix"),
        ({"task": "cooking"}, "task='cooking': must be one of dates"),
        ({"second": "parrot-dora"}, "must be another model than the first"),
        ({"difficulty": 7}, "difficulty=7: there are no such items"),
    ):
        with pytest.raises(ValueError, match=message):
            found.view(asked)


def test_answers_of_other_weights_are_refused(catalogue, file, tmp_path, monkeypatch):
    content = json.loads(file.read_text())
    for model in content["models"][2:]:
        model["adapter_sha256"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="none of its adapters has the weights of one on this page"):
        find_measured(file, catalogue)
    content = measured(catalogue.paths()) | {"base": {"name": "other", "fingerprint": "sha256:0"}}
    file.write_text(json.dumps(content))
    monkeypatch.setattr(catalogue, "weights", lambda names: (Weights("sha256:1"),))
    with pytest.raises(AdapterError, match="on its base"):
        find_measured(file, catalogue)
    with pytest.raises(AdapterError, match="cannot be read"):
        find_measured(tmp_path / "missing.json", catalogue)
    assert find_measured(None, catalogue) is None  # the shipped answers are of the shipped adapters


def test_the_shipped_answers_are_of_the_shipped_adapters():
    """After an adapter has changed they are measured again, with the command in the file."""
    content = read_measured(SHIPPED)
    digests = {model["adapter_sha256"] for model in content["models"]}
    assert digests == {None, *map(adapter_digest, shipped_adapters())}
    for name, items in content["items"].items():
        for model in content["models"]:
            answers = model["answers"][name]
            assert len(answers) == len(items)
            for item, answer in zip(items, answers, strict=True):
                assert exact_match(answer["text"], item["reference"]) == answer["exact"]


@pytest.mark.slow
def test_the_shipped_answers_are_to_test_items():
    for name, items in read_measured(SHIPPED)["items"].items():
        made = TASKS[name].items("test", len(items))
        assert [(one["prompt"], one["reference"]) for one in items] == [(one.prompt, one.completion) for one in made]


@pytest.mark.slow
def test_the_panel_in_a_browser(page_server, browser, tmp_path):
    """Opened by the keyboard, filtered, without a violation, and an item runs with its right answer."""
    server = page_server.serve("measured", out=str(tmp_path))
    visits = Visits(browser, server.address)
    page = visits()
    page.get_by_role("button", name="Where they differ").press("Enter")
    page.wait_for_selector(".ml-differ-item >> nth=2")
    assert page.locator(".ml-differ-prompt b").all_text_contents() == ["<b>1</b>?", "<b>3</b>?", "<b>2</b>?"]
    assert page.locator(".ml-differ-table tbody td").all_text_contents() == ["50 %", "50 %", "90 %", "10 %"]
    assert violations(page) == {}
    page.get_by_label("Difficulty").select_option("1")
    page.wait_for_function("document.querySelectorAll('.ml-differ-item').length === 1")
    page.get_by_label("The other").select_option("parrot-dora")
    page.wait_for_function("document.querySelector('.ml-differ-error').textContent.includes('another model')")
    page.get_by_label("The other").select_option("base")
    page.wait_for_function("document.querySelector('.ml-differ-error').textContent === ''")
    page.get_by_label("Difficulty").select_option("")
    page.get_by_role("button", name="Run: <b>0</b>?").click()
    wait_for_states(page, "length", "eos", "eos")
    assert page.locator(".ml-expected code").inner_text() == "0!"
    assert page.locator(".ml-verdict").all_text_contents()[1] == "✗ wrong"
    visits.close()
