"""The column "auto": the adapter that an index chooses for the prompt answers it, and everything says which and why."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from demo.threads import run_async
from gradio_client import Client
from gradio_client.exceptions import AppError

from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.compare.prompt_index import AdapterIndex, embedding
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.runs.auto_column import AutoColumn
from minilora_hub.demo.runs.comparison import exported_json, exported_markdown
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.votes import VoteStore
from minilora_hub.errors import AdapterError

PROMPTS = {"lora": ["Hello there", "Hi"], "dora": ["12345", "999"]}
GREEDY = Sampling(6)


@pytest.fixture(scope="module")
def engine(saved):
    base, (_, *adapters) = saved
    return CompareEngine(base, adapters, device="cpu")


@pytest.fixture(scope="module")
def file(engine, tmp_path_factory):
    """An index of the two adapters, of a base without a fingerprint."""
    prompts = {name: (f"./{name}", texts) for name, texts in PROMPTS.items()}
    index = AdapterIndex.build(engine.bank.model, engine.tokenizer, "base", "unknown", prompts)
    path = tmp_path_factory.mktemp("index") / "my.index"
    index.save(path)
    return path


@pytest.fixture
def ana(engine, file, tmp_path):
    runner = Runner(engine, Catalogue(engine), auto=AutoColumn(engine, file, "unknown"))
    return Visitors(runner, VoteStore(tmp_path / "votes"), SharedComparisons(tmp_path / "shared")).of("ana")


def run(visitor, prompt):
    """All frames of a comparison."""

    async def collect():
        frames = [visitor.begin(prompt)]
        async for frame in visitor.run_and_keep(prompt, GREEDY):
            frames.append(frame)
        return frames

    return run_async(collect())


@pytest.mark.parametrize(("prompt", "chosen"), [("Hello there", "lora"), ("12345", "dora")])
def test_it_is_answered_by_the_chosen_adapter(engine, ana, file, prompt, chosen):
    last = run(ana, prompt)[-1].stage["columns"][-1]
    choice = AdapterIndex.load(file).choose(embedding(engine.bank.model, engine.tokenizer, prompt))
    assert last["about"]["name"] == "auto"
    assert last["route"] == choice.to_dict()
    assert (last["route"]["adapter"], last["route"]["similarity"]) == (chosen, pytest.approx(1, abs=1e-5))
    wanted = [update.text for update in engine.stream_rows([Row(prompt, chosen, GREEDY)])]
    assert text_of(last) == "".join(wanted)


def test_what_is_kept_names_the_adapter_and_its_weights(engine, ana):
    run(ana, "12345")
    kept = ana.history.last().comparison
    assert kept.names == ["base", "dora", "lora", "auto"]
    assert kept.weights[3] == kept.weights[1] != kept.weights[2]
    assert kept.weights[1].hash.startswith("sha256:")
    said = json.loads(exported_json(kept))["columns"]
    assert said[3]["route"]["runner_up"]["adapter"] == "lora"
    assert "route" not in said[2]
    assert exported_markdown(kept).count("## auto\n\nAnswered by dora, chosen by the prompt: similarity 1.000.") == 1


def test_it_is_answered_again_alone(engine, ana):
    first = run(ana, "12345")[-1].stage["columns"]
    ana.tune(3, {"temperature": 2.0, "seed": 3}, again=True)
    again = run(ana, "12345")[-1].stage["columns"]
    assert again[3]["route"] == first[3]["route"]
    assert text_of(again[3]) != text_of(first[3])
    assert [text_of(one) for one in again[:3]] == [text_of(one) for one in first[:3]]
    assert [one["sampling"] for one in again[1:]] == [{}, {}, {"temperature": 2.0, "seed": 3}]


def test_blind_comparisons_do_not_say_which_it_is(ana):
    ana.blind = True
    assert "route" not in json.dumps([frame.stage for frame in run(ana, "12345")])


def test_one_adapter_leaves_nothing_to_choose(ana):
    run_async(ana.choose(["dora"]))
    assert [one["name"] for one in ana.about()] == ["base", "dora"]


def test_an_index_of_other_adapters_is_refused(engine, file):
    none = CompareEngine(engine.bank.model, tokenizer=engine.tokenizer)
    with pytest.raises(AdapterError, match="its adapters dora, lora are not on this page"):
        AutoColumn(none, file, "unknown")
    index = AdapterIndex.load(file)
    other = AdapterIndex(index.base, "sha256:1", index.adapters, index.vectors, index.owners)
    other.save(file.parent / "other.index")
    with pytest.raises(AdapterError, match="built on 'base' with fingerprint sha256:1"):
        AutoColumn(engine, file.parent / "other.index", "sha256:2")


@pytest.fixture(scope="module")
def served(page_server, saved, file):
    return page_server.serve("stage", folder=str(saved[0].parent), route=str(file), mcp=find_spec("mcp") is not None)


@pytest.mark.parametrize("way", ["api", pytest.param("mcp", marks=pytest.mark.slow)])
def test_a_program_asks_for_it_by_name(engine, file, served, way):
    """Among all adapters of the index, whatever other rows there are; the row says which answered, and why."""
    arguments = {"prompt": "12345", "adapters": ["auto", "lora"], "max_new_tokens": 6}
    if way == "api":
        rows = Client(served.address, verbose=False).predict(**arguments, api_name="/compare")["rows"]
    else:
        from demo.test_mcp import in_session

        told = in_session(served, lambda session: session.call_tool("compare", arguments))
        rows = json.loads(told.content[0].text)["rows"]
    assert [(row["name"], row["kind"]) for row in rows] == [("base", "base"), ("auto", "auto"), ("lora", "LoRA")]
    choice = AdapterIndex.load(file).choose(embedding(engine.bank.model, engine.tokenizer, "12345"))
    assert [row["route"] for row in rows] == [None, choice.to_dict() | {"similarity": pytest.approx(1)}, None]
    assert (choice.adapter, choice.runner_up[0]) == ("dora", "lora")
    answers = [engine.stream_rows([Row("12345", name, GREEDY)]) for name in (None, "dora", "lora")]
    assert [row["text"] for row in rows] == ["".join(update.text for update in one) for one in answers]


def test_an_unknown_name_is_refused_with_those_that_there_are(served):
    with pytest.raises(AppError, match="adapter 'automatic': must be an id on the Hub or one of lora, dora, mix, auto"):
        Client(served.address, verbose=False).predict("hi", adapters=["automatic"], api_name="/compare")
