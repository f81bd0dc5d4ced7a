"""The page's ``/agents.md``: what programs and language models can ask of it, and how, in Markdown.

The Hub serves a page of this name for a Space from the endpoint's description; this one is the same on any machine, and
knows the page's models.
"""

from __future__ import annotations

import json

import gradio as gr
from gradio.utils import get_function_description
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from minilora_hub.compare.engine import Column, CompareEngine
from minilora_hub.demo.api import NAME
from minilora_hub.formatting import inline

PATH = "/agents.md"

PAGE = """# One prompt, answered by {base} and by adapters on it

{description}

## Models

{models}

## With curl

```bash
curl -s {address}gradio_api/call/{name} -H 'Content-Type: application/json' -d '{data}'
curl -sN {address}gradio_api/call/{name}/EVENT_ID    # the event_id that the first call printed: a stream of events
```

`data` holds all arguments, in this order:

{arguments}

Each event holds the whole comparison so far: {returns}. The last one, `complete`, has `"state": "done"`.

## With Python

```python
from gradio_client import Client

Client("{address}").predict("Why is the sky blue?", api_name="/{name}")
```

## With an MCP client

{mcp}

The endpoint's types are in {address}gradio_api/info, and described at {address}?view=api. Requests wait in one queue
with the page's visitors. Nothing else of the page can be called.
"""


def agents_route(demo: gr.Blocks, engine: CompareEngine, mcp: bool) -> Route:
    """Return the route of the page.

    Args:
        demo: the page, with its endpoint.
        engine: its models.
        mcp: whether the endpoint is served as a tool for MCP clients, too.
    """
    taken = demo.get_api_info()["named_endpoints"][f"/{NAME}"]["parameters"]
    values = ["Why is the sky blue?", *(one["parameter_default"] for one in taken[1:])]
    described = [get_function_description(one.fn) for one in demo.fns.values() if one.fn and one.api_name == NAME]
    ((description, arguments, returns),) = described

    async def agents(request: Request) -> PlainTextResponse:
        address = str(request.base_url)
        served = f"The tool `{NAME}`, at `{address}gradio_api/mcp/`." if mcp else "Not served (`minilora demo --mcp`)."
        text = PAGE.format(
            base=inline(engine.columns[0].name),
            description=description,
            models="\n".join(map(_model, engine.columns)),
            address=address,
            name=NAME,
            data=json.dumps({"data": values}),
            arguments="\n".join(f"{at}. `{name}`: {text}" for at, (name, text) in enumerate(_public(arguments), 1)),
            returns="; ".join(returns),
            mcp=served,
        )
        return PlainTextResponse(text, media_type="text/markdown; charset=utf-8")

    return Route(PATH, agents)


def _public(arguments: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, text) for name, text in arguments.items() if name != "request"]


def _model(column: Column) -> str:
    return f"- {inline(column.name)}: {column.kind}{f', {inline(column.detail)}' if column.detail else ''}"
