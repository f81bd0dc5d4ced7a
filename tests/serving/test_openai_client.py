"""The real `openai` client: chat, streams, logprobs, errors, leaving a stream."""

from __future__ import annotations

import asyncio

import pytest
from processes import wait_until
from serving.conftest import run_async

openai = pytest.importorskip("openai", reason="needs the openai client, from the extra test")

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running[1] + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", ["base", "mix", "dora", "lora"])
def test_chat_whole_and_streamed(client, model):
    settings = {"model": model, "messages": CHAT, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 16
    assert len(whole.choices[0].logprobs.content) == 16
    for entry in whole.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_completions(client):
    found = client.completions.create(
        model="base:mix", prompt=["One", "Two"], n=2, max_tokens=5, logprobs=1, echo=True, seed=3
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in found.choices] == ["One", "One", "Two", "Two"]
    assert all(len(choice.logprobs.tokens) == 8 for choice in found.choices)
    assert found.usage.completion_tokens == 20


def test_models_and_extra_fields(client):
    assert {model.id for model in client.models.list()} == {"base", "mix", "dora", "lora"}
    assert client.models.retrieve("mix").parent == "base"
    found = client.chat.completions.create(
        model="mix", messages=CHAT, max_tokens=3, extra_body={"return_routed_experts": True, "top_k": 5}
    )
    assert len(found.choices[0].routed_experts) == 3


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.chat.completions.create(model="nobody", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
        client.chat.completions.create(
            model="mix", messages=CHAT, tools=[{"type": "function", "function": {"name": "x"}}]
        )


def test_leaving_a_stream_frees_its_row(slow):
    server, address = slow

    async def run():
        async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model=server.models.base, messages=CHAT, max_tokens=400, stream=True
            )
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()

    run_async(run())
    wait_until(lambda: not server.scheduler._rows)
    assert server.scheduler._steps.count < 100


def test_busy_is_a_rate_limit_error(slow):
    server, address = slow

    async def run():
        async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(model=server.models.base, messages=CHAT, max_tokens=20)
                for _ in range(12)
            ]
            return await asyncio.gather(*asked, return_exceptions=True)

    found = run_async(run())
    assert sum(isinstance(one, openai.RateLimitError) for one in found) == 4
    assert sum(not isinstance(one, Exception) for one in found) == 8
