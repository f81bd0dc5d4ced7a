"""The comparison as a tool, used by a real MCP client over streamable HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from contextlib import asynccontextmanager

import pytest
from demo.threads import run_async

try:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client
except ImportError:
    assert "CI" not in os.environ, "CI needs the extra mcp"
    pytest.skip("the extra mcp is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def server(page_server):
    return page_server.serve("scripted", mcp=True)


@asynccontextmanager
async def connected(server):
    """A session with the server's tools."""
    address = f"{server.address}gradio_api/mcp/"
    async with streamable_http_client(address) as (read, write, *_), ClientSession(read, write) as session:
        await session.initialize()
        yield session


def in_session(server, scene):
    """Run a scene in a session of its own."""

    async def all_of_it():
        async with connected(server) as session:
            return await scene(session)

    return run_async(asyncio.wait_for(all_of_it(), 90))


def test_there_is_one_tool_and_it_says_what_it_does(server):
    """Nothing that the page does for itself is a tool."""
    tools = in_session(server, lambda session: session.list_tools()).tools
    assert [tool.name for tool in tools] == ["compare"]
    tool = tools[0]
    assert "side by side" in tool.description
    assert "Use it to see what an adapter changes" in tool.description
    assert "rows with name, kind, sampling, text" in tool.description
    schema = tool.inputSchema
    assert schema["required"] == ["prompt"]
    assert schema["properties"]["prompt"]["type"] == "string"
    assert schema["properties"]["max_new_tokens"] == {
        "type": "integer",
        "default": 96,
        "description": "The most tokens of one answer.",
    }
    assert all(field["description"] for field in schema["properties"].values())
    assert {"type": "array", "items": {"type": "string"}} in schema["properties"]["adapters"]["oneOf"]


def test_it_answers_and_tells_its_progress(server):
    """The result is the last item of the stream; a client that asks for progress hears of it on the way."""
    heard = []

    async def listen(progress, total, message):
        heard.append((progress, message))

    async def scene(session):
        arguments = {"prompt": "Hello <b>there</b>", "max_new_tokens": 40}
        return await session.call_tool("compare", arguments, progress_callback=listen)

    before = server.forwards()
    result = in_session(server, scene)
    assert not result.isError
    told = json.loads(result.content[0].text)
    assert told["state"] == "done"
    assert told["forwards"] == server.forwards() - before == 40
    assert [row["text"] for row in told["rows"][1:]] == ["Hello <b>there</b>"] * 2
    assert [row["end"] for row in told["rows"]] == ["length", "eos", "eos"]
    steps = [progress for progress, _ in heard]
    assert len(steps) > 3
    assert steps == sorted(steps)
    told = [re.fullmatch(r"Progress: Step (\d+) of 40", message or "") for _, message in heard]
    tokens = [int(match[1]) for match in told if match]
    assert len(tokens) > 3
    assert tokens == sorted(tokens)
    assert tokens[-1] > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "must not be empty"),
        ({"prompt": "x" * 100_000}, "prompt of 100,000 characters: this page takes at most 8,000"),
        ({"prompt": "hi", "adapters": ["nobody"]}, "adapter 'nobody'"),
        ({"prompt": "hi", "max_new_tokens": 100_000}, "max_new_tokens=100000: this page gives at most 512"),
        ({"prompt": "hi", "max_new_tokens": "many"}, "'many'"),
    ],
    ids=["empty", "100 kB", "adapter", "tokens", "type"],
)
def test_what_is_refused_is_an_error_with_its_reason(server, arguments, message):
    """The client's model can read it and do better."""
    before = server.forwards()
    result = in_session(server, lambda session: session.call_tool("compare", arguments))
    assert result.isError
    assert message in result.content[0].text
    assert server.forwards() == before


def test_a_page_is_no_tool_unless_it_is_asked_for(page_server):
    """Without `mcp` there is nothing at the address."""
    server = page_server.serve("scripted")
    with pytest.raises(BaseException, match=r"404|405|unhandled errors") as caught:  # a group of them
        in_session(server, lambda session: session.list_tools())
    assert not isinstance(caught.value, (KeyboardInterrupt, SystemExit))


def test_an_abandoned_call_ends_with_its_limit(server):
    """Gradio does not pass on that an MCP client is gone: known, bounded by the limit of tokens, and in the README."""

    async def scene(session):
        arguments = {"prompt": "a long text, " * 5, "max_new_tokens": 60}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.call_tool("compare", arguments), 0.6)

    before = server.forwards()
    in_session(server, scene)
    assert 0 < server.settled() - before <= 60
    time.sleep(0.1)
