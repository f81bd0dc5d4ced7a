"""What a visitor's browser is sent of a blind run, and which adapters they see: without a browser."""

import json

import pytest
from demo.threads import run_async
from tiny_stand_ins import ScriptedBase, byte_tokenizer, save_parrots

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.ui.blind_bar import view
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.ui.panels import open_memory, open_runs
from minilora_hub.errors import AdapterError, PageError


@pytest.fixture
def runs(tmp_path):
    """Runs over a base and two parrots."""
    parrots = save_parrots(tmp_path, {"parrot-dora": "dora", "parrot-mix": "mixlora"})
    # Slow enough that a run has several frames.
    engine = CompareEngine(ScriptedBase(delay=0.02), parrots, tokenizer=byte_tokenizer())
    return open_runs(engine, None, open_memory(tmp_path / "data"), ())


def run(runs, visitor="ana", prompt="Hello", **hooks):
    """Every frame of a run."""

    async def collect():
        frames = [runs.begin(visitor)]
        async for frame in runs.run(visitor, prompt, Sampling(12)):
            frames.append(frame)
            if "each" in hooks:
                hooks["each"]()
        return frames

    return run_async(collect())


def test_nothing_that_is_sent_before_the_vote_tells_the_columns_apart(runs):
    """Every frame, and what the bar shows, in full: what is not sent cannot be found by a curious visitor."""
    runs.make_blind("ana", True)
    frames = run(runs)
    told = json.dumps([[frame.stage, frame.status] for frame in frames] + [view(runs, "ana")])
    for secret in (
        "parrot",
        "dora",
        "DoRA",
        "mix",
        "MixLoRA",
        '"base',
        "parameters",
        '"l"',
        '"a"',
        '"r"',
        'sampling": {',
    ):
        assert secret not in told, secret
    last = frames[-1].stage["columns"]
    kept = runs.visits.last("ana")
    assert kept.closed is None
    assert [text_of(one) for one in last] == [text_of(kept.record.columns[index]) for index in kept.order]
    assert runs.visits.history("ana") == []
    open_frames = json.dumps([frame.stage for frame in run(runs, "bob")])
    assert "parrot-dora" in open_frames


def test_blind_switched_off_during_a_run_shows_the_names_and_takes_no_vote(runs):
    runs.make_blind("ana", True)
    frames = run(runs, each=lambda: runs.make_blind("ana", False))
    assert frames[-1].stage["columns"][1]["about"]["name"] == "parrot-dora"
    with pytest.raises(PageError, match="only a blind comparison"):
        runs.visits.vote("ana", "0")


def test_a_failed_column_opens_a_blind_comparison(runs):
    runs.make_blind("ana", True)
    frames = run(runs, prompt="explode, please")
    assert frames[-1].stage["columns"][1]["about"]["name"] == "parrot-dora"
    assert view(runs, "ana")["words"].startswith("No vote: an answer was stopped or failed")


def test_a_refused_prompt_is_not_kept(runs):
    run(runs, prompt=" ")
    with pytest.raises(PageError, match="nothing was run"):
        runs.visits.last("ana")


def test_a_visitor_who_leaves_is_forgotten(runs):
    runs.make_blind("ana", True)
    run(runs)
    runs.leave("ana")
    assert not runs.is_blind("ana")
    assert runs.visits.history("ana") == []


def test_visitors_choose_among_what_the_page_has(runs):
    run_async(runs.choose("ana", ["parrot-mix", "parrot-mix"]))
    assert runs.chosen("ana") == ["parrot-mix"]
    assert runs.chosen("bob") == ["parrot-dora", "parrot-mix"]
    for names, told in (([], "0 adapters"), (["parrot-dora", *map(str, range(5))], "6 adapters")):
        with pytest.raises(PageError, match=told):
            run_async(runs.choose("ana", names))
    with pytest.raises(AdapterError, match="own adapters only"):
        run_async(runs.choose("ana", ["/etc"]))
    assert runs.chosen("ana") == ["parrot-mix"]


def test_allowed_folders_are_looked_through_once_and_by_name(runs, tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        Catalogue(runs.engine, None, [tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="none of the folders in it holds an adapter"):
        Catalogue(runs.engine, None, [tmp_path / "empty"])
    with pytest.raises(AdapterError, match="already an adapter called 'parrot-dora'"):
        Catalogue(runs.engine, None, [tmp_path])
    save_parrots(tmp_path / "more", {"spare": "dora"})
    (tmp_path / "more" / "notes").mkdir()
    catalogue = Catalogue(runs.engine, None, [tmp_path / "more"])
    assert catalogue.names == ["parrot-dora", "parrot-mix", "spare"]
    assert catalogue.card("spare").kind == "DoRA"
    with pytest.raises(AdapterError, match="no such adapter"):
        catalogue.card("../more/spare")


def test_the_card_of_a_shipped_adapter_tells_what_was_measured():
    from minilora_hub.adapter_folder.results import Results
    from minilora_hub.compare.found_adapters import shipped_adapters
    from minilora_hub.demo.adapters.cards import read_card

    for folder in shipped_adapters():
        card, results = read_card(folder.name, folder), Results.load(folder)
        assert card.parameters == results.parameters
        assert card.license == "apache-2.0"
        assert [(one.task, one.value, one.base_value) for one in card.scores] == [
            (one.task, one.value, one.base_value) for one in results.evaluation[:6]
        ]
        losses = [loss for _, loss in results.training.loss]
        assert min(losses) <= min(card.loss) <= max(card.loss) <= max(losses)
        assert len(card.loss) <= 120
        assert card.trouble is None


def test_a_damaged_results_file_is_told_on_the_card(tmp_path):
    from minilora_hub.demo.adapters.cards import read_card

    (folder,) = save_parrots(tmp_path, {"parrot": "dora"})
    (folder / "results.json").write_text('{"schema_version": 1, "method": "<b>"}')
    assert "results.json" in read_card("parrot", folder).trouble
