"""Comparisons in the scheduler: visitors and OpenAI's API share forwards, and each answers as if it were alone."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from demo.threads import run_async

from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.demo.runs import runner, scheduled
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.errors import ServingError
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.scheduler import Scheduler

PROMPT = "Why is the sky as blue as it is, and not green or red?"  # two blocks of the cache
DELAY = 0.02


@pytest.fixture
def engine(saved, monkeypatch):
    monkeypatch.setattr(runner, "FRAME_SECONDS", 0)
    base, adapters = saved
    return CompareEngine(base, adapters, device="cpu")


def slow(engine):
    engine.bank.model.register_forward_pre_hook(lambda *_: time.sleep(DELAY))
    return engine


def columns_of(engine):
    """The base, each adapter, and two experts alone."""
    mixture = next(column for column in engine.columns if column.experts)
    return [*engine.columns, mixture.alone(1), mixture.alone(3)]


async def all_of(runs, prompt, columns, sampling, **options):
    return [moment async for moment in runs.answer(prompt, sampling, columns, **options)]


def updates_of(moments):
    return [update for moment in moments for update in moment.updates]


def ends(moments):
    return {update.row: update.reason for update in updates_of(moments) if update.finished}


def told(updates, count):
    """For each row its tokens with their experts, and what it would have taken alone."""
    rows = [[] for _ in range(count)]
    for update in updates:
        if update.token_id is not None:
            rows[update.row].append((update.token_id, update.experts, update.forwards_alone))
    return rows


def test_visitors_and_the_api_share_forwards_and_answer_as_alone(engine):
    """All kinds of rows with settings of their own, in four comparisons that begin at different steps."""
    columns, prompts = columns_of(engine), [PROMPT, "Hi", "hello " * 9, PROMPT]
    own = [{}, {"temperature": 0.9, "seed": 4}, {}, {"temperature": 0.7, "top_k": 9}, {}, {}]
    sampling = Sampling(16)

    def rows(prompt):
        return [column.row(prompt, replace(sampling, **one)) for column, one in zip(columns, own, strict=True)]

    wanted = [told(list(engine.stream_rows(rows(prompt))), len(columns)) for prompt in prompts]
    [(request,)] = [told(list(engine.stream_rows([Row("Hi", "dora", sampling)])), 1)]
    page = Runner(engine, limits=PageLimits(at_once=4))
    updates = []

    async def visit(number):
        await asyncio.sleep(0.01 * number)
        return await all_of(page, prompts[number], columns, sampling, own=own)

    async def scene():
        visits = [asyncio.create_task(visit(number)) for number in range(len(prompts))]
        await asyncio.sleep(0.02)
        page._scheduler.start()
        (answer,) = engine.answers([Row("Hi", "dora", sampling)])[0]
        page._scheduler.submit([ServedRow(answer, answer.limit, updates.append)])
        return await asyncio.gather(*visits)

    before = engine.forwards
    done = run_async(scene())
    assert engine.forwards - before < 3 * 16  # of 5 * 16 in turns
    for moments, expected in zip(done, wanted, strict=True):
        assert told(updates_of(moments), len(columns)) == expected
        assert 16 <= sum(moment.forwards for moment in moments) <= 20  # prompts may be read in several
        assert ends(moments) == dict.fromkeys(range(len(columns)), "length")
        assert [moment.finished for moment in moments].index(True) == len(moments) - 1
    assert told(updates, 1) == [request]
    again = run_async(all_of(page, PROMPT, columns, sampling, own=own))  # its blocks are in the cache
    assert told(updates_of(again), len(columns)) == wanted[0]


@pytest.mark.parametrize("way", ["stop", "halt", "close", "cancel"])
def test_who_leaves_is_gone_within_a_step(engine, way):
    """By Stop, by stopping one column, by closing the iterator, by cancelling its task; another goes on."""
    slow(engine)
    page, stop, halted = Runner(engine), threading.Event(), set()

    async def scene():
        stays = asyncio.create_task(all_of(page, "Hi", engine.columns[:1], Sampling(30)))
        moments = page.answer(PROMPT, Sampling(300), engine.columns, stop, halted=halted)
        while not (await anext(moments)).updates:
            pass
        before = engine.forwards
        if way == "halt":
            halted.add(2)
        elif way == "stop":
            stop.set()
        if way in ("halt", "stop"):
            seen = [await anext(moments), await anext(moments)] if way == "halt" else [one async for one in moments]
            assert ends(seen) == ({2: "stopped"} if way == "halt" else dict.fromkeys(range(4), "stopped"))
            assert sum(moment.forwards for moment in seen) <= 2
        elif way == "close":
            await moments.aclose()
        else:
            reading = asyncio.create_task(anext(moments))
            await asyncio.sleep(DELAY / 4)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        while len(page._scheduler._rows) > (4 if way == "halt" else 1):
            await asyncio.sleep(0.001)
        assert engine.forwards - before <= 2  # the step that ran, and the one that began before this was looked at
        await moments.aclose()
        return await stays

    assert ends(run_async(scene())) == {0: "length"}
    assert len(page.queue) == 0


def test_a_stop_while_waiting_costs_nothing(engine):
    slow(engine)

    async def scene():
        page, stop = Runner(engine, limits=PageLimits(at_once=1)), threading.Event()
        long = asyncio.create_task(all_of(page, "long", engine.columns, Sampling(200)))
        waiting = asyncio.create_task(all_of(page, "never", engine.columns, Sampling(200), stop=stop))
        await asyncio.sleep(5 * DELAY)
        stop.set()
        moments = await waiting
        long.cancel()
        return moments

    moments = run_async(scene())
    assert ends(moments) == dict.fromkeys(range(4), "stopped")
    assert sum(moment.forwards for moment in moments) == 0


def test_an_adapter_that_is_gone_ends_its_own_rows(engine):
    gone = replace(engine.columns[1], name="nobody")
    moments = run_async(all_of(Runner(engine), "Hi", [engine.columns[0], gone], Sampling(5)))
    assert ends(moments) == {0: "length", 1: "error"}
    assert "'nobody'" in next(update.error for update in updates_of(moments) if update.error)


def test_an_adapter_is_loaded_while_visitors_are_answered(engine, saved):
    """Between two steps; and one that is in use is not removed."""
    slow(engine)

    async def scene():
        page = Runner(engine)
        answers = asyncio.create_task(all_of(page, "Hi", engine.columns, Sampling(30)))
        await asyncio.sleep(5 * DELAY)
        column = await asyncio.to_thread(engine.load, "more", saved[1][1])
        with pytest.raises(ValueError, match="rows are using this adapter"):
            engine.unload("mix")
        more = await all_of(page, "Hi", [engine.columns[0], column], Sampling(5))
        assert not answers.done()
        return more, await answers

    for moments, count in zip(run_async(scene()), (2, 4), strict=True):
        assert ends(moments) == dict.fromkeys(range(count), "length")


def test_a_visitor_who_waits_keeps_the_adapters(engine, saved):
    """Another visitor's link may unload adapters meanwhile, but not this one."""
    slow(engine)
    column = engine.load("linked", saved[1][1])

    async def scene():
        page = Runner(engine, limits=PageLimits(at_once=1))
        first = asyncio.create_task(all_of(page, "Hi", engine.columns, Sampling(20)))
        waiting = asyncio.create_task(all_of(page, "Hi", [column], Sampling(5)))
        await asyncio.sleep(5 * DELAY)
        with pytest.raises(ValueError, match="or wait for it"):
            engine.unload("linked")
        await first
        return await waiting

    assert ends(run_async(scene())) == {0: "length"}
    engine.unload("linked")


def test_a_page_with_little_memory_has_a_smaller_cache(engine, monkeypatch):
    """Rows that don't fit together wait for each other; one that never fits is refused."""
    built = []

    def scarce(engine, limits):
        built.append(limits.cache_tokens)
        if limits.cache_tokens > 128:
            raise ServingError(400, "too little memory")
        return Scheduler(engine, limits)

    monkeypatch.setattr(scheduled, "Scheduler", scarce)
    with pytest.raises(ServingError):
        Runner(engine)
    assert built[-1] <= scheduled.LEAST_CACHE
    monkeypatch.setattr(scheduled, "LEAST_CACHE", 64)
    page = Runner(engine, limits=PageLimits(at_once=2, rows=4))
    with pytest.raises(ValueError, match="an answer of up to 300: must be at most 128 tokens together"):
        page.answer("Hi", Sampling(300), engine.columns)
    moments = run_async(all_of(page, PROMPT, engine.columns, Sampling(30)))
    assert ends(moments) == dict.fromkeys(range(4), "length")


def test_rows_of_the_page_leave_the_apis_places_free(engine):
    """Each has a bound of its own: rows of the page do not count in that of the API."""
    slow(engine)
    page = Runner(engine, limits=PageLimits(at_once=1, rows=4, waiting=0))

    def request(count):
        answers = engine.answers([Row("Hi", None, Sampling(4))] * count)[0]
        page._scheduler.submit([ServedRow(answer, answer.limit, lambda update: None) for answer in answers])

    async def scene():
        visit = asyncio.create_task(all_of(page, "Hi", engine.columns, Sampling(8)))
        await asyncio.sleep(3 * DELAY)
        request(2)
        with pytest.raises(ServingError, match="busy with 2 of at most 2"):
            request(1)
        return await visit

    assert ends(run_async(scene())) == dict.fromkeys(range(4), "length")
