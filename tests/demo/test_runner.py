"""Comparisons that run at once in one engine: none fails, none is forgotten, one that is left computes nothing.

The stand-in's rows cannot be packed, so its comparisons take turns.
"""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import tiny_stand_ins
from demo.threads import run_async

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.demo.runs import runner
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.runner import Runner

DELAY = 0.01


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A base whose answers end by length only, and two parrots."""
    parrots = tiny_stand_ins.save_parrots(tmp_path_factory.mktemp("parrots"), {"dora": "dora", "mix": "mixlora"})
    base = tiny_stand_ins.ScriptedBase(delay=DELAY)
    return CompareEngine(base, parrots, tokenizer=tiny_stand_ins.byte_tokenizer())


async def all_of(runs, prompt, tokens, stop=None, columns=None):
    """Run one comparison to its end: (its moments, when each came)."""
    moments, times = [], []
    async for moment in runs.answer(prompt, Sampling(tokens), columns or runs.engine.columns, stop):
        moments.append(moment)
        times.append(time.perf_counter())
    return moments, times


def ends(moments):
    return {update.row: update.reason for moment in moments for update in moment.updates if update.finished}


@pytest.mark.slow
def test_sixteen_at_once_take_turns(engine):
    """None fails; all progress side by side, so that nobody ends much later than a fair share of the work."""

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=16))
        before = engine.forwards
        done = await asyncio.gather(*(all_of(runs, f"visitor {number}", 30) for number in range(16)))
        assert engine.forwards - before == 16 * 30
        return done

    done = run_async(scene())
    for moments, _ in done:
        assert ends(moments) == {0: "length", 1: "eos", 2: "eos"}
        assert sum(moment.forwards for moment in moments) == 30
    # By the time that anybody has ended, everybody has computed most of theirs: steps are dealt in turns.
    first_end = min(times[-1] for _, times in done)
    for moments, times in done:
        computed = sum(moment.forwards for moment, when in zip(moments, times, strict=True) if when <= first_end)
        assert computed >= 20


def test_visitors_share_forwards(saved, monkeypatch):
    """On a base whose rows can be packed: a step is one forward for all of them."""
    monkeypatch.setattr(runner, "FRAME_SECONDS", 0)
    base, adapters = saved
    engine = CompareEngine(base, adapters, device="cpu")

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=16))
        before = engine.forwards
        done = await asyncio.gather(*(all_of(runs, f"visitor {number}", 12) for number in range(8)))
        return engine.forwards - before, done

    forwards, done = run_async(scene())
    assert forwards <= 8 + 2 * 12  # in turns they would be 8 * 12
    for moments, _ in done:
        assert ends(moments) == dict.fromkeys(range(4), "length")
        assert sum(moment.forwards for moment in moments) == 12


def test_a_short_answer_does_not_wait_for_a_long_one(engine):
    """It ends when the long one has computed as many steps, and not many more."""

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=4))
        long = asyncio.create_task(all_of(runs, "a long one", 300))
        await asyncio.sleep(0.2)
        short, _ = await all_of(runs, "short", 10)
        before = engine.forwards
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return short, before

    start = engine.forwards
    short, before = run_async(scene())
    assert ends(short)[0] == "length"
    assert before - start < 120


@pytest.mark.slow
def test_those_without_a_place_wait_in_order(engine):
    """Each is told a position that only falls, then computes."""

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=1))
        return await asyncio.gather(*(all_of(runs, f"visitor {number}", 150) for number in range(3)))

    done = run_async(scene())
    begun = []
    for number, (moments, times) in enumerate(done):
        waiting = [moment.waiting.position for moment in moments if moment.waiting]
        assert waiting == sorted(waiting, reverse=True)
        assert max(waiting, default=0) == number
        begun.append(next(when for moment, when in zip(moments, times, strict=True) if moment.forwards))
        assert ends(moments)[0] == "length"
    assert begun == sorted(begun)
    assert begun[1] > done[0][1][-1] - 0.2  # the second begins when the first has ended


@pytest.mark.slow
def test_the_estimate_comes_true(engine):
    """What the last one is told, once steps were measured, against how long it then takes."""

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=2))
        return await asyncio.gather(*(all_of(runs, "hello", 120) for _ in range(5)))

    moments, times = run_async(scene())[-1]
    begins = next(when for moment, when in zip(moments, times, strict=True) if moment.forwards)
    told = [
        (moment.waiting.seconds, begins - when)
        for moment, when in zip(moments, times, strict=True)
        if moment.waiting and moment.waiting.seconds
    ]
    assert told
    for said, took in told:
        assert said == pytest.approx(took, rel=0.6, abs=0.7)


@pytest.mark.parametrize("way", ["stop", "close", "cancel"])
def test_whoever_leaves_frees_the_computation_within_one_step(engine, way):
    """By the Stop button, by closing the iterator, by cancelling the task that reads it."""

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=1))
        stop = threading.Event()
        moments = runs.answer("a long text", Sampling(400), engine.columns, stop)
        while not (await anext(moments)).updates:
            pass
        reading = asyncio.create_task(anext(moments))
        await asyncio.sleep(DELAY / 2)
        before = engine.forwards
        if way == "stop":
            stop.set()
            last = await reading
            while not last.finished:
                last = await anext(moments)
            assert ends([last]) == {0: "stopped", 1: "stopped", 2: "stopped"}
        elif way == "close":
            await reading
            before = engine.forwards
            await moments.aclose()
        elif way == "cancel":
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await moments.aclose()
        await asyncio.sleep(0.3)
        assert (
            engine.forwards - before <= 2
        )  # the step that ran, and one that may have begun before the counter was read
        settled = engine.forwards
        again, _ = await all_of(runs, "the next", 5)
        assert engine.forwards == settled + 5
        assert ends(again)[0] == "length"

    run_async(scene())


def test_a_stop_while_waiting_costs_nothing(engine):
    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=1))
        stop = threading.Event()
        long = asyncio.create_task(all_of(runs, "long", 200))
        waiting = asyncio.create_task(all_of(runs, "never", 200, stop))
        await asyncio.sleep(0.3)
        stop.set()
        moments, _ = await waiting
        assert ends(moments) == {0: "stopped", 1: "stopped", 2: "stopped"}
        assert sum(moment.forwards for moment in moments) == 0
        assert not any(update.text for moment in moments for update in moment.updates)
        long.cancel()

    run_async(scene())


def test_one_who_breaks_the_forward_breaks_only_their_own(engine):
    """An error of all rows of one comparison, and NaN in the adapters of another: the third goes on."""

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=3))
        return await asyncio.gather(*(all_of(runs, prompt, 20) for prompt in ("destroy it", "explode", "hello")))

    destroyed, exploded, fine = (ends(moments) for moments, _ in run_async(scene()))
    assert destroyed == {0: "error", 1: "error", 2: "error"}
    assert exploded == {0: "length", 1: "error", 2: "error"}
    assert fine == {0: "length", 1: "eos", 2: "eos"}


def test_what_is_too_much_is_refused_before_it_takes_a_place(engine):
    async def scene():
        runs = Runner(engine, limits=PageLimits(prompt=10, tokens=20, rows=2, at_once=1, waiting=0))
        two = engine.columns[:2]
        for prompt, tokens, columns, message in (
            ("x" * 11, 5, two, "prompt of 11 characters: this page takes at most 10"),
            ("", 5, two, "must not be empty"),
            ("x", 21, two, "max_new_tokens=21: this page gives at most 20"),
            ("x", 5, engine.columns, "3 answers: this page gives 1 to 2 at once"),
            ("x", 5, [], "0 answers"),
        ):
            with pytest.raises(ValueError, match=message):
                runs.answer(prompt, Sampling(tokens), columns)
        first = runs.answer("x", Sampling(5), two)
        with pytest.raises(ValueError, match="the queue is full, with 0 waiting"):
            runs.answer("x", Sampling(5), two)
        assert [moment.finished async for moment in first][-1]
        assert len((await all_of(runs, "x", 5, columns=two))[0]) > 0

    run_async(scene())


def test_a_long_prompt_is_read_in_turns(engine, monkeypatch):
    """Reading it takes many steps, between which others answer."""
    monkeypatch.setattr("minilora_hub.compare.batch.PREFILL_TOKENS", 48)

    async def scene():
        runs = Runner(engine, limits=PageLimits(at_once=2))
        reader = runs.answer("words " * 60, Sampling(2), engine.columns)
        first = await anext(reader)
        assert not first.updates
        other, _ = await all_of(runs, "hi", 3)
        second = await anext(reader)
        assert not second.finished
        await reader.aclose()
        return other

    assert ends(run_async(scene()))[0] == "length"
