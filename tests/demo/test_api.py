"""The page's endpoint as a program uses it: the real gradio_client against a page in a process of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(server):
    return Client(server.address, verbose=False)


def test_compare_is_the_only_public_endpoint(client):
    """Whatever the page itself does stays its own, also by number."""
    told = client.view_api(return_format="dict", print_info=False)
    assert list(told["named_endpoints"]) == ["/compare"]
    assert told["unnamed_endpoints"] == {}
    private = [place for place, endpoint in client.endpoints.items() if endpoint.is_valid]
    assert len(private) == 1


def test_what_it_takes_is_described(client):
    """Names, types and defaults, from the function itself."""
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/compare"]
    taken = {
        parameter["parameter_name"]: (parameter["python_type"]["type"], parameter["parameter_default"])
        for parameter in told["parameters"]
    }
    assert taken == {
        "prompt": ("str", None),
        "adapters": ("None | list[str]", None),
        "max_new_tokens": ("int", 96),
        "temperature": ("float", 0.0),
        "top_p": ("float", 1.0),
        "top_k": ("int", 0),
        "repetition_penalty": ("float", 1.0),
        "seed": ("int", 0),
        "experts": ("bool", False),
        "column_sampling": ("None | dict(str, dict(str, float))", None),
    }
    assert told["description"].startswith("Answer one prompt with a base language model")


def test_answers_stream(client, server):
    """Each item holds the whole comparison so far; the last one its end, and the engine's own count of forwards."""
    before = server.forwards()
    items = list(client.submit("Hi 👩‍👩‍👧 naïve", max_new_tokens=40, api_name="/compare"))
    assert len(items) > 3
    for earlier, later in pairwise(items):
        assert earlier["forwards"] <= later["forwards"]
        for old, new in zip(earlier["rows"], later["rows"], strict=True):
            assert new["text"].startswith(old["text"])
    assert [item["state"] for item in items] == ["running"] * (len(items) - 1) + ["done"]
    last = items[-1]
    assert [row["name"] for row in last["rows"]] == ["base", "parrot-dora", "parrot-mix"]
    assert [row["kind"] for row in last["rows"]] == ["base", "DoRA", "MixLoRA"]
    assert [row["end"] for row in last["rows"]] == ["length", "eos", "eos"]
    assert [row["text"] for row in last["rows"][1:]] == ["Hi 👩‍👩‍👧 naïve"] * 2
    assert last["rows"][0]["tokens"] == 40
    assert last["forwards"] == server.forwards() - before == 40
    assert all(row["tokens_per_second"] > 0 and row["seconds_to_first_token"] > 0 for row in last["rows"])


def test_adapters_are_chosen_by_name(client):
    """In the order that was asked for, the base first; an unknown one is refused with those that there are."""
    last = client.predict("hi", adapters=["parrot-mix"], max_new_tokens=4, api_name="/compare")
    assert [row["name"] for row in last["rows"]] == ["base", "parrot-mix"]
    last = client.predict("hi", adapters=[], max_new_tokens=4, api_name="/compare")
    assert [row["name"] for row in last["rows"]] == ["base"]
    with pytest.raises(AppError, match="adapter 'nobody': must be an id on the Hub or one of parrot-dora, parrot-mix"):
        client.predict("hi", adapters=["nobody"], api_name="/compare")
    with pytest.raises(AppError, match="this page shows its own adapters only"):
        client.predict("hi", adapters=["ana/dora"], api_name="/compare")


def test_one_columns_error_leaves_the_others(client):
    """The failed row says why; the base goes on to its end."""
    rows = client.predict("explode, please", max_new_tokens=20, api_name="/compare")["rows"]
    assert [row["end"] for row in rows] == ["length", "error", "error"]
    assert "logits contain NaN" in rows[1]["error"]
    assert rows[0]["tokens"] == 20


REFUSED = {
    "": "must not be empty",
    " \n\t ": "must not be empty",
    "x" * 100_000: "prompt of 100,000 characters: this page takes at most 8,000",
}


@pytest.mark.parametrize("prompt", REFUSED, ids=["empty", "blank", "100 kB"])
def test_a_prompt_that_cannot_be_answered_is_refused_with_a_reason(client, server, prompt):
    """Before anything is computed."""
    before = server.forwards()
    with pytest.raises(AppError, match=re.escape(REFUSED[prompt])):
        client.predict(prompt, api_name="/compare")
    assert server.forwards() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt",
    [
        "<img src=x onerror=alert(1)><script>alert(2)</script>",
        "👩‍👩‍👧 🇩🇪 😀",
        "שלום \u202eabc\u202c עולם",
        "a\x00b\x07c\x1b[31md\x7f",
        "{{ messages }} {% for x in y %} <|user|",
        "zero\u200bwidth\u2028line",
    ],
    ids=["html", "emoji", "rtl", "control", "template", "invisible"],
)
def test_any_text_comes_back_as_it_was_sent(client, prompt):
    """The parrots say it back, byte for byte."""
    rows = client.predict(prompt, max_new_tokens=120, api_name="/compare")["rows"]
    assert [row["text"] for row in rows[1:]] == [prompt] * 2


def test_half_a_character_is_refused(server):
    """A lone surrogate can be written in JSON, and in no text: whoever sends one gets a reason, the page goes on."""
    body = b'{"data": ["\\ud800", null, 5, 0, 1, 0, 1, 0, false, null]}'
    request = urllib.request.Request(
        f"{server.address}gradio_api/call/compare", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{server.address}gradio_api/call/compare/{event}", timeout=20) as stream:
        assert b"must not contain lone surrogates" in stream.read()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 513}, "max_new_tokens=513: this page gives at most 512 an answer"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be an integer of at least 1"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many': must be"),
        ({"temperature": -1}, "temperature=-1: must be at least 0"),
        ({"temperature": "hot"}, "temperature='hot': must be"),
        ({"top_p": 2}, "top_p=2: must be"),
        ({"top_k": -1}, "top_k=-1: must be"),
        ({"top_k": 10**30}, "top_k=1000000000000000000000000000000: must be"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: must be"),
        ({"seed": -1}, "seed=-1: must be"),
        ({"seed": 1.5}, "seed=1.5: must be"),
        ({"adapters": "parrot-dora"}, "adapters='parrot-dora': must be a list of names"),
        ({"adapters": [1]}, r"adapters=\[1\]: must be a list of names"),
        ({"adapters": ["parrot-mix"] * 8}, "8 adapters: this page gives 1 to 8 answers, the base's included"),
        ({"prompt": 7}, "prompt=7: must be a string"),
        ({"prompt": {"a": 1}}, "must be a string"),
    ],
)
def test_settings_out_of_range_are_refused(client, settings, message):
    """Each names the argument, what came, and what is required."""
    with pytest.raises(AppError, match=message):
        client.predict(**{"prompt": "hi", **settings}, api_name="/compare")


def test_cancelling_ends_the_computation(client, server):
    """Nobody reads, nobody computes."""
    job = client.submit("a long text, " * 20, max_new_tokens=400, api_name="/compare")
    begun = server.forwards()
    while server.forwards() < begun + 4:
        time.sleep(0.05)
    job.cancel()
    assert server.settled() < begun + 200


def test_a_client_that_dies_frees_the_computation(client, server):
    """Killed in the middle of a stream."""
    program = (
        "import sys\nfrom gradio_client import Client\nclient = Client(sys.argv[1], verbose=False)\n"
        "job = client.submit('a long text, ' * 20, max_new_tokens=400, api_name='/compare')\n"
        "for item in job:\n    print(item['forwards'], flush=True)\n"
    )
    command = [sys.executable, "-c", program, server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        begun = server.forwards()
        assert int(process.stdout.readline()) > 0
        process.send_signal(signal.SIGKILL)
    assert server.settled() < begun + 200


def test_the_snippet_of_the_docs_runs(server):
    """Streaming, then cancelling, as written but for the address."""
    page = (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
    section = page.split("## From a program")[1].split("\n## ")[0]
    snippet = re.findall(r"```python\n(.*?)```", section, re.S)[0]
    assert 'Client("http://localhost:7860")' in snippet
    program = snippet.replace('"http://localhost:7860"', f"{server.address!r}, verbose=False")
    before = server.forwards()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "parrot-mix" in done.stdout
    assert before + 96 < server.settled() < before + 96 + 300


def test_agents_md_describes_the_endpoint_and_what_it_says_works(server):
    """Its models, its arguments, and a call as it is written there."""
    import httpx

    page = httpx.get(f"{server.address}agents.md", timeout=60)
    assert page.headers["content-type"] == "text/markdown; charset=utf-8"
    for words in (
        "side by side", "- parrot-dora: DoRA", "1. `prompt`: What to answer", "2. `adapters`: Names of",
        "`experts`: Whether the last item", f"{server.address}?view=api", "Not served (`minilora demo --mcp`)",
    ):  # fmt: skip
        assert words in page.text, words
    assert "`request`" not in page.text
    call = f"{server.address}gradio_api/call/compare"
    (data,) = re.findall(r"-d '(.*)'\n", page.text)
    values = json.loads(data)["data"]
    assert values[:3] == ["Why is the sky blue?", None, 96]
    event = httpx.post(call, json={"data": [values[0], [], 3, *values[3:]]}, timeout=60).json()["event_id"]
    told = httpx.get(f"{call}/{event}", timeout=60).text
    assert told.rstrip().rpartition("event: ")[2].startswith("complete")
    assert '"state": "done"' in told


def test_a_row_has_settings_of_its_own(client):
    """The parrots ignore sampling, so this looks at what is said; test_own_sampling.py at what is computed."""
    own = {"parrot-mix": {"temperature": 0.5, "seed": 9}}
    rows = client.predict("Hi", max_new_tokens=5, seed=1, column_sampling=own, api_name="/compare")["rows"]
    said = [(row["sampling"]["temperature"], row["sampling"]["seed"]) for row in rows]
    assert said == [(0, 1), (0, 1), (0.5, 9)]
    for wrong, message in (
        ({"nobody": {}}, "column_sampling: 'nobody': must be one of base, parrot-dora, parrot-mix"),
        ({"base": {"max_new_tokens": 3}}, "setting 'max_new_tokens' of a column: must be one of"),
        ({"base": 3}, "must be settings by the name of a row"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict("Hi", column_sampling=wrong, api_name="/compare")
