"""Many clients at once: batches of all kinds, the bound of the queue, failures, adapters that come and go."""

from __future__ import annotations

import json
import shutil
import threading

import httpx
import pytest
import tiny_stand_ins
from processes import wait_until
from serving.conftest import chat, gather, rows, served

from minilora_hub.compare.answer import Answer
from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.errors import ServingError
from minilora_hub.serving import batching_manager
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.scheduler import Scheduler
from minilora_hub.serving.settings import ServerLimits

WORDS = ("Hi.", "Why is the sky blue?", "A much longer prompt than the others, with many more words. " * 4)


def expected(engine, words, model, tokens, **sampling):
    """What the engine answers alone."""
    column = next(c for c in engine.columns if c.name == model)
    return "".join(u.text for u in engine.stream(words, Sampling(tokens, **sampling), columns=[column]))


@pytest.mark.parametrize("many", [16, 1])
def test_a_mixed_batch_gives_each_models_own_tokens(saved, running, monkeypatch, many):
    """Rows of all kinds, lengths and settings join and leave while others run, also in steps without those."""
    monkeypatch.setattr(batching_manager, "MANY_STREAMS", many)
    engine = CompareEngine(saved[0], saved[1], device="cpu")
    cases = [
        (model, words, 5 + 7 * (index % 4), {"temperature": 0} if index % 3 else {"temperature": 0.8, "seed": index})
        for index, (model, words) in enumerate((m, w) for w in WORDS for m in ("base", "mix", "dora", "lora") * 2)
    ]
    before = running[0].scheduler._steps.count
    found = gather(running[1], [chat(model, words, tokens, **more) for model, words, tokens, more in cases])
    steps = running[0].scheduler._steps.count - before
    for (model, words, tokens, more), (status, body) in zip(cases, found, strict=True):
        assert status == 200
        text = expected(engine, words, model, tokens, **more)
        assert body["choices"][0]["message"]["content"] == text, (model, words, tokens, more)
    assert steps < sum(tokens for _, _, tokens, _ in cases) / 3  # rows shared steps


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_200_clients_are_answered_or_told_to_wait(slow, stream):
    """No stream is broken: each ends with [DONE]."""
    server, address = slow
    requests = [chat("dora", f"number {index}", 60, temperature=0, stream=stream) for index in range(200)]
    found = gather(address, requests, read=text_of_stream) if stream else gather(address, requests)
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    for index, (status, body) in enumerate(found):
        if status == 200:
            text = body if stream else body["choices"][0]["message"]["content"]
            assert text == f"number {index}"
        else:
            error = (json.loads(body) if stream else body)["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert statuses.count(200) >= 8
    wait_until(lambda: rows(server) == 0)


def text_of_stream(response):
    """The text of a stream that ended as it must; the body of an error."""
    if response.status_code != 200:
        return response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert choices[-1]["finish_reason"] == "stop"
    return "".join(choice["delta"]["content"] for choice in choices)


@pytest.mark.slow
def test_200_clients_fit_a_longer_queue(saved):
    """All are answered where the queue is long enough, each by its own adapter."""
    engine = CompareEngine(saved[0], saved[1], device="cpu")
    names = ("base", "mix", "dora", "lora")
    alone = {name: expected(engine, "Hi.", name, 6) for name in names}
    with served(engine, saved[1], limits=ServerLimits(rows=64, waiting=200)) as (server, address):
        found = gather(address, [chat(names[index % 4], "Hi.", 6, temperature=0) for index in range(200)])
        assert [status for status, _ in found] == [200] * 200
        for index, (_, body) in enumerate(found):
            assert body["choices"][0]["message"]["content"] == alone[names[index % 4]]
        assert server.scheduler._steps.rows_computed > 3 * server.scheduler._steps.count


def test_more_answers_than_ever_fit(slow):
    status, body = gather(slow[1], [chat("dora", "hi", 4, n=9)])[0]
    assert (status, body["error"]["param"]) == (400, "n")


def test_nan_ends_only_its_own_row(slow):
    found = gather(
        slow[1], [chat(m, words, 60, temperature=0) for m, words in (("dora", "explode now"), ("mix", "I am fine"))]
    )
    assert [status for status, _ in found] == [500, 200]
    assert "NaN" in found[0][1]["error"]["message"]
    assert found[1][1]["choices"][0]["message"]["content"] == "I am fine"


def test_a_step_that_fails_ends_its_rows_and_the_server_goes_on(slow):
    assert gather(slow[1], [chat("dora", "destroy all", 60, temperature=0)])[0][0] == 500
    assert gather(slow[1], [chat("dora", "again", 60)])[0][0] == 200


def test_adapters_come_and_go(saved, tmp_path):
    base, (mix, dora, lora) = saved
    engine = CompareEngine(base, [lora], device="cpu")
    damaged = tmp_path / "damaged"
    shutil.copytree(dora, damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with served(engine, [lora]) as (_, address), httpx.Client(base_url=address, timeout=60) as http:

        def post(path, **body):
            return http.post(path, json=body)

        def ask(model):
            return http.post("/v1/chat/completions", json=chat(model, "Hi.", 8, temperature=0))

        assert ask("mine").status_code == 404
        assert post("/v1/load_lora_adapter", lora_name="mine", lora_path=str(mix)).status_code == 200
        assert post("/v1/load_lora_adapter", lora_name="mine", lora_path=str(dora)).status_code == 400
        assert post("/v1/load_lora_adapter", lora_name="base", lora_path=str(dora)).status_code == 400
        assert post("/v1/load_lora_adapter", lora_name="a b", lora_path=str(dora)).status_code == 400
        assert post("/v1/load_lora_adapter", lora_name="gone", lora_path=str(tmp_path / "gone")).status_code == 400
        refused = post("/v1/load_lora_adapter", lora_name="damaged", lora_path=str(damaged))
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "adapter_unusable"
        alone = CompareEngine(base, [mix], device="cpu")
        assert ask("mine").json()["choices"][0]["message"]["content"] == expected(alone, "Hi.", "mix", 8)
        assert ask("lora").status_code == 200
        assert post("/v1/unload_lora_adapter", lora_name="mine").status_code == 200
        assert ask("mine").status_code == 404
        assert post("/v1/unload_lora_adapter", lora_name="mine").status_code == 404
        assert post("/v1/unload_lora_adapter", lora_name="base").status_code == 400
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["base", "lora"]


def test_an_adapter_in_use_is_not_unloaded(slow):
    server, address = slow
    with httpx.Client(base_url=address, timeout=60) as http:
        request = chat("dora", "x" * 200, 250, stream=True, temperature=0)
        with http.stream("POST", "/v1/chat/completions", json=request) as response:
            lines = response.iter_lines()  # a generator, which closes the response when it is collected
            next(lines)
            refused = httpx.post(address + "/v1/unload_lora_adapter", json={"lora_name": "dora"})
        assert refused.status_code == 409
        wait_until(lambda: rows(server) == 0)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "dora"}).status_code == 200


def test_an_adapter_whose_rows_wait_is_not_unloaded(slow):
    server, _ = slow
    waiting = [answer_row(server, None, 300) for _ in range(4)] + [answer_row(server, "dora", 3)]
    server.scheduler.submit(waiting)
    wait_until(lambda: waiting[0].running)
    assert not waiting[4].running
    with pytest.raises(ValueError, match="'dora': rows are using this adapter, or wait for it"):
        server.engine.unload("dora")
    server.scheduler.cancel(waiting)
    wait_until(lambda: rows(server) == 0)
    server.engine.unload("dora")


def answer_row(server, adapter, limit):
    """A row of a request."""
    tokenizer = server.engine.tokenizer
    answer = Answer(0, Row("", adapter), [257, 97, 256, 258], limit, tokenizer, ())
    return ServedRow(answer, limit, lambda update: None)


def test_loading_needs_permission(saved):
    engine = CompareEngine(saved[0], device="cpu")
    with served(engine, allow_loading=False) as (_, address):
        for path in ("load", "unload"):
            body = {"lora_name": "x", "lora_path": str(saved[1][0])}
            assert httpx.post(f"{address}/v1/{path}_lora_adapter", json=body).status_code == 403


def test_a_folder_of_adapters_is_read_on_demand(saved, tmp_path):
    """Within a bound of memory; a damaged one is refused when it is asked for, one without a configuration is none."""
    base, folders = saved
    for index in range(6):
        shutil.copytree(folders[index % 3], tmp_path / f"a{index}")
    (tmp_path / "a5" / "config.json").unlink(missing_ok=True)
    (tmp_path / "a5" / "adapter_config.json").unlink(missing_ok=True)
    engine = CompareEngine(base, folders, device="cpu", memory_limit=1)
    with served(engine, folders, folders=[tmp_path]) as (server, address):
        names = [model.name for model in server.models.all()]
        assert names == ["base", "mix", "dora", "lora", "a0", "a1", "a2", "a3", "a4"]
        weights = tmp_path / "a4" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        asked = ["a0", "a1", "a2", "a3", "a4", "a5", "mix", "dora", "lora"]
        found = gather(address, [chat(name, "Hi.", 9, temperature=0) for name in asked])
        by_name = dict(zip(asked, found, strict=True))
        assert [by_name[name][0] for name in asked] == [200, 200, 200, 200, 400, 404, 200, 200, 200]
        text = {name: by_name[name][1]["choices"][0]["message"]["content"] for name in asked if by_name[name][0] == 200}
        assert (text["a0"], text["a1"], text["a2"], text["a3"]) == (
            text["mix"],
            text["dora"],
            text["lora"],
            text["mix"],
        )
        assert gather(address, [chat("a0", "Hi.", 2)])[0][0] == 200
        assert gather(address, [chat("a1", "Hi.", 2)])[0][0] == 200
        assert [entry.name for entry in engine.bank.list() if entry.loaded] == ["a1"]


def test_shutting_down_ends_open_answers(tmp_path):
    folders = tiny_stand_ins.save_parrots(tmp_path, {"dora": "dora"})
    engine = CompareEngine(tiny_stand_ins.ScriptedBase(0.02), folders, tokenizer=tiny_stand_ins.byte_tokenizer())
    done = []
    with served(engine, folders) as (server, address):
        asked = threading.Thread(target=lambda: done.extend(gather(address, [chat(server.models.base, "x", 450)])))
        asked.start()
        wait_until(lambda: rows(server) == 1)
    asked.join()
    assert done[0][0] == 503
    assert done[0][1]["error"]["message"] == "the server is shutting down"


def test_a_manager_that_fails_ends_every_answer(slow, monkeypatch):
    """Outside a forward it cannot go on: nobody waits for ever, and the server says that it is down."""
    server, address = slow

    def fail(*budgets):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(server.scheduler._manager.batch_processor.scheduler, "schedule_batch", fail)
    found = gather(address, [chat("dora", "hi", 60)] * 3)
    assert {status for status, _ in found} <= {500, 503}
    assert any("out of luck" in body["error"]["message"] for _, body in found)
    wait_until(lambda: httpx.get(address + "/health").status_code == 503)
    assert gather(address, [chat("dora", "hi", 60)])[0][0] == 503


def test_a_row_longer_than_the_cache_is_refused(saved):
    engine = CompareEngine(saved[0], device="cpu")
    with served(engine, limits=ServerLimits(cache_tokens=64)) as (_, address):
        assert gather(address, [chat("base", "x" * 30, 20)])[0][0] == 200
        status, body = gather(address, [chat("base", "x" * 30, 40)])[0]
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


def test_a_cache_larger_than_the_memory_is_refused(saved):
    with pytest.raises(ServingError, match="max_cache_tokens=1000000000000: a cache of this size"):
        Scheduler(CompareEngine(saved[0], device="cpu"), ServerLimits(cache_tokens=10**12))
