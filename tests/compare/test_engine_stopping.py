"""Stopping, visitors after each other, and rows that fail while the others go on."""

import shutil
import threading

import tiny_stand_ins as tiny
from compare.engine_answers import PROMPT, answers, tokens
from safetensors.torch import load_file, save_file

from minilora_hub.compare.engine import CompareEngine, Row, Sampling


def test_an_adapter_that_is_gone_ends_its_own_rows(engine):
    """Unknown, or its file damaged since it was registered."""
    updates = list(engine.stream_rows([Row(PROMPT, "nobody"), Row(PROMPT, "mix", Sampling(3))]))
    assert (updates[0].reason, updates[0].row) == ("error", 0)
    assert "'nobody': not registered" in updates[0].error
    assert len([u for u in updates if u.row == 1]) == 3


def test_stop_takes_effect_within_one_step(engine):
    """After `stop.set()` no forward runs any more, and every row says so."""
    stop = threading.Event()
    stream = engine.stream(PROMPT, Sampling(200), stop)
    for _ in range(10):
        next(stream)
    before = engine.forwards
    stop.set()
    rest = list(stream)
    assert engine.forwards == before == 3
    assert [u.row for u in rest if u.finished] == [0, 1, 2, 3]
    assert all(u.reason == "stopped" and u.token_id is None and u.tokens == 3 for u in rest if u.finished)


def test_stop_before_the_start_computes_nothing(engine):
    """A visitor who gives up in the queue costs nothing."""
    stop = threading.Event()
    stop.set()
    assert [u.reason for u in engine.stream(PROMPT, Sampling(9), stop)] == ["stopped"] * 4
    assert engine.forwards == 0


def test_closing_the_stream_ends_the_work_and_frees_the_engine(engine):
    """A closed tab leaves nothing running, nothing locked and no adapter held."""
    stream = engine.stream(PROMPT, Sampling(200))
    next(stream)
    stream.close()
    assert engine.forwards == 1
    assert len(list(engine.stream(PROMPT, Sampling(2)))) == 8
    engine.unload("mix")
    assert [column.name for column in engine.columns] == ["base", "dora", "lora"]


def test_streams_in_turns_leave_each_other_alone(engine):
    """One begins later, has settings of its own, loses a row and is closed: both give the tokens they give alone."""
    later = [column.row("Hi", Sampling(9, temperature=0.8, seed=1, top_k=20)) for column in engine.columns]
    wanted = [tokens(row) for row in answers(engine, Sampling(12))], tokens(list(engine.stream_rows(later)))
    halted: set[int] = set()
    first = engine.stream_steps([one.row(PROMPT, Sampling(12)) for one in engine.columns])
    seen, theirs = [next(first), next(first)], []
    second = engine.stream_steps(later, halted=halted)
    for _ in range(3):
        seen.append(next(first))
        theirs += next(second).updates
    halted.add(2)
    ended, *others = sorted(next(second).updates, key=lambda update: not update.finished)
    assert (ended.row, ended.reason, [update.row for update in others]) == (2, "stopped", [0, 1, 3])
    second.close()
    updates = [update for step in [*seen, *first] for update in step.updates]
    assert [tokens([update for update in updates if update.row == row]) for row in range(4)] == wanted[0]
    assert tokens(theirs) == wanted[1][: len(theirs)]


def test_two_visitors_never_compute_at_once():
    """Two threads stream from one engine: forwards do not overlap, and both answers are right."""
    engine = CompareEngine(tiny.tiny_llama(), tokenizer=tiny.byte_tokenizer())
    alone = tokens(answers(engine, Sampling(30))[0])
    inside, overlaps, results = [], [], []
    model = engine.bank.model
    model.register_forward_pre_hook(lambda module, args: (overlaps.extend(inside), inside.append(1))[0])
    model.register_forward_hook(lambda module, args, output: inside.clear())

    def visit():
        results.append(tokens(list(engine.stream(PROMPT, Sampling(30)))))

    threads = [threading.Thread(target=visit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert overlaps == []
    assert results == [alone, alone]


def test_a_row_with_nan_leaves_the_others_running(parrots):
    """The failed rows say what happened; the rest finishes."""
    base, dora, mix = answers(parrots, Sampling(12), "explode now")
    for parrot in (dora, mix):
        assert parrot[-1].reason == "error"
        assert "NaN" in parrot[-1].error
        assert parrot[-1].tokens == 5
        assert "".join(u.text for u in parrot) == "explo"
    assert len(tokens(base)) == 12


def test_an_adapter_that_computes_nan_touches_no_other_row(saved, tmp_path):
    """Finite weights, but their products overflow: next to it the same tokens as without it."""
    base, (_, dora, _) = saved
    shutil.copytree(dora, tmp_path / "huge")
    file = tmp_path / "huge" / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    engine = CompareEngine(base, [tmp_path / "huge", dora], device="cpu")
    without = answers(CompareEngine(base, [dora], device="cpu"), Sampling(10))
    plain, huge, same = answers(engine, Sampling(10))
    assert huge[-1].reason == "error"
    assert "NaN" in huge[-1].error
    assert tokens(plain) == tokens(without[0])
    assert tokens(same) == tokens(without[1])


def test_an_error_of_the_model_itself_ends_every_row(parrots):
    """Nothing tells whose fault it is; the engine stays usable."""

    def break_down(module, args, kwargs):
        raise RuntimeError("<b>boom</b>")

    hook = parrots.bank.model.register_forward_pre_hook(break_down, with_kwargs=True)
    updates = list(parrots.stream(PROMPT, Sampling(3)))
    assert [(u.reason, u.error) for u in updates] == [("error", "RuntimeError: <b>boom</b>")] * 3
    hook.remove()
    assert len(list(parrots.stream(PROMPT, Sampling(3)))) == 9


def test_stop_before_the_start_of_an_adapter_that_is_gone(engine):
    """Put away while its visitor waited and gave up: stopped, and no error."""
    stop = threading.Event()
    stop.set()
    assert [u.reason for u in engine.stream_rows([Row(PROMPT, "nobody"), Row(PROMPT, "mix")], stop)] == ["stopped"] * 2
