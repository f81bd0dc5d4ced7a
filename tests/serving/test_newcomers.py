"""Rows that join while many generate: their prompts are read in steps of their own; and whose turn it is."""

from __future__ import annotations

import threading

import pytest
import tiny_stand_ins
from processes import wait_until
from serving.conftest import chat, gather, rows, served

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.serving import batching_manager
from minilora_hub.serving.settings import ServerLimits


def steps_with(tmp_path, streams, words, cache_tokens=16384):
    """Per step in which `streams` rows and a newcomer run: rows that generate, tokens of prompts that are read."""
    folders = tiny_stand_ins.save_parrots(tmp_path, {"dora": "dora", "mix": "mixlora"})
    engine = CompareEngine(tiny_stand_ins.ScriptedBase(delay=0.003), folders, tokenizer=tiny_stand_ins.byte_tokenizer())
    steps, found = [], {}
    with served(engine, folders, limits=ServerLimits(rows=40, cache_tokens=cache_tokens)) as (server, address):
        forward = server.scheduler._steps.forward

        def recorded(parts, inputs):
            read = [len(part.ids) for part in parts if part.start == 0 or len(part.ids) > 1]
            steps.append((len(parts) - len(read), sum(read)))
            return forward(parts, inputs)

        recorded.forget = forward.forget
        server.scheduler._steps.forward = recorded
        texts = [f"{index:02} is a number" * 3 for index in range(streams)]
        requests = [chat(("mix", "dora")[index % 2], text, 150, temperature=0) for index, text in enumerate(texts)]
        others = threading.Thread(target=lambda: found.update(all=gather(address, requests)))
        others.start()
        wait_until(lambda: (streams, 0) in steps)
        began = len(steps)
        [(status, body)] = gather(address, [chat("dora", words, 8, temperature=0)])
        assert (status, body["choices"][0]["message"]["content"]) == (200, words[:8])
        ended = len(steps)
        others.join()
        wait_until(lambda: rows(server) == 0)
    assert [status for status, _ in found["all"]] == [200] * streams
    answers = [body["choices"][0]["message"]["content"] for _, body in found["all"]]
    assert answers == texts
    return steps[began:ended]


def test_first_rows_are_read_first(tmp_path):
    """Of two requests for three answers each, the first rows in one step, the others in the next."""
    folders = tiny_stand_ins.save_parrots(tmp_path, {"dora": "dora"})
    engine = CompareEngine(tiny_stand_ins.ScriptedBase(delay=0.003), folders, tokenizer=tiny_stand_ins.byte_tokenizer())
    steps, hold, go = [], threading.Event(), threading.Event()
    with served(engine, folders, limits=ServerLimits(rows=40)) as (server, address):
        forward = server.scheduler._steps.forward

        def recorded(parts, inputs):
            read = [part.key for part in parts if part.start == 0 or len(part.ids) > 1]
            steps.append((len(parts) - len(read), len(read)))
            if hold.is_set():
                go.wait()
            return forward(parts, inputs)

        recorded.forget = forward.forget
        server.scheduler._steps.forward = recorded
        streams = [chat("dora", f"{index:02} is a number" * 3, 150, temperature=0) for index in range(20)]
        newcomers = [chat("dora", f"newcomer {index}", 8, temperature=0, n=3) for index in range(2)]
        found = {}
        others = threading.Thread(target=lambda: found.update(others=gather(address, streams)))
        new = threading.Thread(target=lambda: found.update(new=gather(address, newcomers)))
        others.start()
        wait_until(lambda: (20, 0) in steps)
        hold.set()
        new.start()
        wait_until(lambda: server.scheduler.load().waiting == 6)
        hold.clear()
        began = len(steps)
        go.set()
        new.join()
        others.join()
        wait_until(lambda: rows(server) == 0)
    assert steps[began : began + 3] == [(0, 2), (0, 4), (26, 0)]
    assert [[one["message"]["content"] for one in body["choices"]] for _, body in found["new"]] == [
        ["newcomer"] * 3,
        ["newcomer"] * 3,
    ]
    assert [body["choices"][0]["message"]["content"] for _, body in found["others"]] == [
        f"{index:02} is a number" * 3 for index in range(20)
    ]


def test_no_row_waits_for_ever(tmp_path, monkeypatch):
    """A second answer lets three rows pass that came after it, and no more."""
    monkeypatch.setattr(batching_manager, "OVERTAKEN", 3)
    folders = tiny_stand_ins.save_parrots(tmp_path, {"dora": "dora"})
    engine = CompareEngine(tiny_stand_ins.ScriptedBase(), folders, tokenizer=tiny_stand_ins.byte_tokenizer())
    served_rows, go = [], threading.Event()
    with served(engine, folders, limits=ServerLimits(rows=1)) as (server, address):
        forward = server.scheduler._steps.forward

        def recorded(parts, inputs):
            go.wait()
            served_rows.extend(part.key for part in parts if part.key not in served_rows)
            return forward(parts, inputs)

        recorded.forget = forward.forget
        server.scheduler._steps.forward = recorded
        threads = []
        for request in [chat("dora", "two", 3, n=2), *(chat("dora", f"one {index}", 3) for index in range(6))]:
            before = rows(server)
            threads.append(threading.Thread(target=gather, args=(address, [request])))
            threads[-1].start()
            wait_until(lambda before=before: rows(server) > before)
        go.set()
        for thread in threads:
            thread.join()
        wait_until(lambda: rows(server) == 0)
    assert [int(key.split()[-1]) for key in served_rows] == [0, 2, 3, 4, 1, 5, 6, 7]


LONG = "a prompt of many tokens " * 12


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """While 5 or 20 rows generate, a step reads at most 80 tokens of prompts."""
    monkeypatch.setattr(batching_manager, "NEW_TOKENS", 80)
    monkeypatch.setattr(batching_manager, "NEW_FOR_EACH", 1)


def test_many_rows_skip_every_other_step(tmp_path):
    """Between two pieces of a long prompt, they generate."""
    steps = steps_with(tmp_path, 20, LONG)
    reading = [index for index, (_, read) in enumerate(steps) if read]
    assert [steps[index][0] for index in reading] == [0] * len(reading)
    assert len(reading) >= 3
    assert reading[1:] == [index + 2 for index in reading[:-1]]
    assert all(steps[index + 1] == (20, 0) for index in reading[:-1])


def test_few_rows_generate_while_a_prompt_is_read(tmp_path):
    steps = steps_with(tmp_path, 5, LONG)
    reading = [generating for generating, read in steps if read]
    assert len(reading) >= 3
    assert set(reading) == {5}


@pytest.mark.parametrize("cache_tokens", [4096, 4800])
def test_a_newcomer_that_finds_little_room(tmp_path, cache_tokens):
    """Most of the cache is taken: every answer is right, whoever waits."""
    assert steps_with(tmp_path, 20, "a newcomer with few words", cache_tokens)
