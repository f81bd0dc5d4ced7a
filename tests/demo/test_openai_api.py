"""OpenAI's API beside the page: the real client against a running page, whose own comparisons go on meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from demo.serving import STAGE_ADAPTERS
from gradio_client import Client
from processes import wait_until

from minilora_hub.demo.openai_api import openai_from_environment

KEY = "page-key"
LIMITS = {"prompt": 40, "tokens": 60, "rows": 3, "at_once": 2, "waiting": 2}
MODELS = ("base", *STAGE_ADAPTERS)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(page_server, saved):
    return page_server.serve("stage", folder=str(saved[0].parent), openai=KEY, limits=LIMITS)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.address}v1", api_key=KEY, max_retries=0) as made:
        yield made


def answer(client, model, tokens=12, **fields):
    return client.chat.completions.create(model=model, messages=HELLO, max_tokens=tokens, temperature=0, **fields)


@pytest.mark.slow
def test_models_answer_as_on_the_page_while_the_page_compares(server, client):
    page = Client(server.address, verbose=False)
    rows = page.predict("Hello", max_new_tokens=12, api_name="/compare")["rows"]
    expected = {row["name"]: row["text"] for row in rows}
    assert [model.id for model in client.models.list()] == list(MODELS) == list(expected)

    job = page.submit("Tell me more.", max_new_tokens=200, api_name="/compare")
    next(iter(job))
    assert {model: answer(client, model).choices[0].message.content for model in MODELS} == expected
    assert not job.done()  # the page's comparison had its turns, and has not ended
    pieces = answer(client, "dora", stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected["dora"]
    job.cancel()


def test_the_pages_limits_and_the_key_hold(server, client):
    for fields, words in (
        ({"max_tokens": 61}, "max_tokens=61: this server gives at most 60 an answer"),
        (
            {"messages": [{"role": "user", "content": "x" * 41}]},
            "messages: 41 characters, this server takes at most 40",
        ),
        ({"n": 4, "temperature": 1}, "asks for 4 answers: must be at most 3"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(**{"model": "mix", "messages": HELLO, "max_tokens": 2} | fields)
    for prompt in ("x" * 41, [80] * 41):
        with pytest.raises(openai.BadRequestError, match="prompt: 41 characters"):
            client.completions.create(model="mix", prompt=prompt, max_tokens=2)
    with pytest.raises(openai.AuthenticationError):
        answer(client.with_options(api_key="other"), "mix")
    headers = {"Authorization": f"Bearer {KEY}"}
    load = {"lora_name": "more", "lora_path": "/tmp"}
    assert httpx.post(f"{server.address}v1/load_lora_adapter", json=load, headers=headers).status_code == 403
    assert httpx.get(server.address).status_code == 200  # the page itself needs no key
    assert "minilora" in httpx.get(f"{server.address}metrics", headers=headers).text


@pytest.mark.slow
def test_more_than_the_queue_holds_is_told_to_wait(client):
    def status(_):
        try:
            return answer(client, "lora", 60).choices[0].finish_reason
        except openai.RateLimitError as error:
            return error.status_code

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(status, range(8)))
    assert found.count("length") == 4
    assert found.count(429) == 4


def test_a_client_that_leaves_frees_its_rows(server, client):
    stream = client.completions.create(model="mix", prompt="Hello", max_tokens=60, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    headers = {"Authorization": f"Bearer {KEY}"}

    def row_is_free():
        """The rows of the answer are counted as given up, and none runs."""
        lines = httpx.get(f"{server.address}metrics", headers=headers).text.splitlines()
        return {'minilora_cancelled_rows_total{model="mix"} 1', "minilora_rows_running 0"} <= set(lines)

    wait_until(row_is_free)


def test_it_is_off_unless_the_environment_asks_for_it(page_server, monkeypatch):
    plain = page_server.serve("scripted")
    assert httpx.get(f"{plain.address}v1/models").status_code == 404
    monkeypatch.delenv("MINILORA_OPENAI", raising=False)
    assert openai_from_environment(None) is None
    for name, value, words in (
        ("MINILORA_OPENAI", "yes", "MINILORA_OPENAI='yes': must be 0 or 1"),
        ("MINILORA_API_KEY", " ", "MINILORA_API_KEY=' ': must hold some text"),
    ):
        monkeypatch.setenv("MINILORA_OPENAI", "1")
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=words):
            openai_from_environment(object())
    monkeypatch.setenv("MINILORA_OPENAI", "1")
    with pytest.raises(ValueError, match="MINILORA_OPENAI=1: must be 0 on ZeroGPU"):
        openai_from_environment(None)
