"""Rows with a common prefix share its keys and values, within one adapter and one version of its files only."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from serving.conftest import chat, gather, served
from serving.test_together import expected

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.serving.token_spaces import TokenSpaces

WORDS = "A long prompt, of which several blocks of the cache are full. " * 3


def tokens_read(server, address, requests):
    """The tokens that the forwards of the requests read, with the answers' texts."""
    read = []
    forward = server.scheduler._steps.forward
    server.scheduler._steps.forward = lambda parts, inputs: (
        read.append(inputs["input_ids"].numel()) or forward(parts, inputs)
    )
    server.scheduler._steps.forward.forget = forward.forget
    found = gather(address, requests)
    server.scheduler._steps.forward = forward
    assert [status for status, _ in found] == [200] * len(requests)
    return sum(read), [body["choices"][0]["message"]["content"] for _, body in found]


@pytest.fixture
def server(saved, tmp_path):
    base, folders = saved
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    engine = CompareEngine(base, copies, device="cpu")
    with served(engine, copies) as parts:
        yield parts


@pytest.mark.parametrize("name", ["base", "mix", "dora"])
def test_the_second_answer_reads_less(server, saved, name):
    server, address = server
    other = "lora" if name != "lora" else "base"
    first, texts = tokens_read(server, address, [chat(name, WORDS, 4, temperature=0)])
    assert first > len(WORDS)
    assert tokens_read(server, address, [chat(other, WORDS, 4, temperature=0)])[0] == first  # nothing of another model
    second, again = tokens_read(server, address, [chat(name, WORDS + "More.", 4, temperature=0)])
    assert second < 64
    engine = CompareEngine(saved[0], saved[1], device="cpu")
    assert texts == [expected(engine, WORDS, name, 4)]
    assert again == [expected(engine, WORDS + "More.", name, 4)]


def test_a_short_system_turn_is_shared_by_different_prompts(server):
    """Of a chat template's own, with which all prompts begin: 24 tokens are fewer than most blocks have."""
    server, address = server
    system = {"role": "system", "content": "You answer in few words."}
    first, second = (
        tokens_read(server, address, [chat("dora", "", 4) | {"messages": [system, {"role": "user", "content": text}]}])
        for text in ("Why is it so?", "Do cats swim?")
    )
    assert second[0] <= first[0] - 24


def test_other_files_under_the_same_name_share_nothing(server, saved):
    server, address = server
    first, _ = tokens_read(server, address, [chat("dora", WORDS, 4, temperature=0)])
    engine, folder = server.engine, server.engine.bank.find("dora").folder
    engine.unload("dora")
    shutil.copy(saved[1][0] / "config.json", folder)
    shutil.copy(saved[1][0] / "adapter_model.safetensors", folder)
    engine.load("dora", folder)
    second, texts = tokens_read(server, address, [chat("dora", WORDS, 4, temperature=0)])
    assert second == first
    assert texts == [expected(CompareEngine(saved[0], saved[1], device="cpu"), WORDS, "mix", 4)]


def test_scores_of_a_prompt_are_complete(server):
    _, address = server
    request = {"model": "mix", "prompt": WORDS, "max_tokens": 0, "echo": True, "logprobs": 1}
    scores = [
        body["choices"][0]["logprobs"]["token_logprobs"]
        for _, body in gather(address, [request] * 2, "/v1/completions")
    ]
    assert len(scores[0]) == len(WORDS)
    assert scores[0][1:] == pytest.approx(scores[1][1:], abs=1e-4)


def test_answers_go_on_when_all_spaces_were_given(saved):
    """Of a cache with as few spaces as rows: no row gets one that another has, or blocks of an earlier one."""
    engine = CompareEngine(saved[0], saved[1], device="cpu")
    with served(engine, saved[1]) as (server, address):
        server.scheduler._spaces._most = 3
        for index in range(4):
            name = ("base", "mix", "dora", "lora")[index]
            scored = {"model": name, "prompt": WORDS, "max_tokens": 0, "echo": True, "logprobs": 1}
            assert [status for status, _ in gather(address, [scored], "/v1/completions")] == [200]
            text = gather(address, [chat(name, WORDS, 4, temperature=0)])[0][1]["choices"][0]["message"]["content"]
            assert text == expected(engine, WORDS, name, 4)


def test_spaces():
    used, forgotten = set(), []
    spaces = TokenSpaces(2**29, lambda: {*used}, lambda: forgotten.append(1))
    assert [spaces.of("base"), spaces.of("a"), spaces.of("base"), spaces.of(None)] == [0, 1, 0, 2]
    ids = [spaces.enter(token, 2) for token in (5, 7)]
    assert ids == [2**30 + 5, 2**30 + 7]
    assert spaces.leave(torch.tensor(ids, dtype=torch.int32)).tolist() == [5, 7]
    used |= {0, 2}
    assert not forgotten
    assert (spaces.of(None), len(forgotten)) == (1, 1)


def test_a_failed_step_leaves_no_blocks(server, saved):
    """What a forward that broke off has not written is not shared later."""
    server, address = server
    forward = server.scheduler._steps.forward
    broken = threading.Event()

    def fail(parts, inputs):
        if not broken.is_set():
            broken.set()
            raise RuntimeError("broken")
        return forward(parts, inputs)

    server.scheduler._steps.forward = fail
    fail.forget = forward.forget
    assert gather(address, [chat("dora", WORDS, 4, temperature=0)])[0][0] == 500
    server.scheduler._steps.forward = forward
    read, texts = tokens_read(server, address, [chat("dora", WORDS, 4, temperature=0)])
    assert read > len(WORDS)
    assert texts == [expected(CompareEngine(saved[0], saved[1], device="cpu"), WORDS, "dora", 4)]
