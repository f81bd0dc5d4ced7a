"""The server as curl sees it: answers, errors in OpenAI's form, streams, health and metrics."""

from __future__ import annotations

import json
import shutil
import subprocess

import httpx
import pytest
import torch
from compare.engine_answers import alone
from processes import wait_until
from serving.conftest import served

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.serving.answering import event
from minilora_hub.serving.settings import MOST_BODY_BYTES

PROMPT = "Why is the sky blue?"
CHAT = [{"role": "user", "content": PROMPT}]


def chat(http, model="base", **fields):
    """POST a chat: status and body."""
    done = http.post("/v1/chat/completions", json={"model": model, "messages": CHAT, "temperature": 0, **fields})
    return done.status_code, done.json()


def complete(http, model="base", prompt=PROMPT, **fields):
    """POST a completion: status and body."""
    done = http.post("/v1/completions", json={"model": model, "prompt": prompt, "temperature": 0, **fields})
    return done.status_code, done.json()


def engine_text(engine, adapter, tokens, **sampling):
    """What the engine answers, as text."""
    column = next(c for c in engine.columns if c.adapter == adapter)
    return "".join(u.text for u in engine.stream(PROMPT, Sampling(tokens, **sampling), columns=[column]))


@pytest.mark.parametrize("model", ["base", "mix", "dora", "lora"])
def test_each_model_gives_the_tokens_of_the_engine(http, saved, model):
    engine = CompareEngine(saved[0], saved[1], device="cpu")
    adapter = None if model == "base" else model
    status, body = chat(http, model, max_tokens=24)
    assert status == 200
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": engine_text(engine, adapter, 24), "refusal": None}
    assert choice["finish_reason"] == "length"
    prompt = len(engine.prompt_ids(PROMPT, adapter))
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 24, "total_tokens": prompt + 24}
    sampled = chat(http, model, max_tokens=24, temperature=0.9, top_p=0.9, top_k=20, seed=4)[1]
    text = engine_text(engine, adapter, 24, temperature=0.9, top_p=0.9, top_k=20, seed=4)
    assert sampled["choices"][0]["message"]["content"] == text


def test_models_have_a_kind_and_a_parent(http):
    body = http.get("/v1/models").json()
    found = {model["id"]: (model["kind"], model["parent"]) for model in body["data"]}
    assert found == {
        "base": ("base", None),
        "mix": ("MixLoRA", "base"),
        "dora": ("DoRA", "base"),
        "lora": ("LoRA", "base"),
    }
    assert http.get("/v1/models/base:dora").json()["id"] == "dora"


def test_a_model_has_several_names(http, saved):
    expected = chat(http, "dora", max_tokens=5)[1]["choices"]
    for name in ("base:dora", "me/base:dora", str(saved[1][1])):
        assert chat(http, name, max_tokens=5)[1]["choices"] == expected, name
    assert chat(http, "me/base", max_tokens=5)[1]["choices"] == chat(http, "base", max_tokens=5)[1]["choices"]


def test_n_answers_have_seeds_of_their_own(http):
    def texts(**fields):
        return [
            c["message"]["content"] for c in chat(http, "mix", max_tokens=12, temperature=1, **fields)[1]["choices"]
        ]

    three = texts(n=3, seed=7)
    assert len(set(three)) == 3
    assert texts(n=3, seed=7) == three
    assert [texts(seed=seed)[0] for seed in (7, 8, 9)] == three


def test_a_stop_text_is_not_shown(http):
    whole = complete(http, "mix", max_tokens=30)[1]["choices"][0]["text"]
    stop = whole[10:13]
    choice = complete(http, "mix", max_tokens=30, stop=[stop])[1]["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("model", ["base", "mix", "dora"])
def test_prompt_logprobs_are_those_of_the_model_alone(http, saved, model):
    """lm-eval's loglikelihood: echo, logprobs and one token; the whole prompt in one forward of another class."""
    base, folders = saved
    folder = {"base": base, **{path.name: path for path in folders}}[model]
    ids = list(range(40, 70))
    _, body = complete(http, model, [ids, ids[:9]], max_tokens=1, echo=True, logprobs=3)
    for choice, prompt in zip(body["choices"], (ids, ids[:9]), strict=True):
        with torch.no_grad():
            logits = alone(folder)(torch.tensor([prompt])).logits[0]
        expected = torch.log_softmax(logits, dim=-1)
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        theirs = [expected[at, token].item() for at, token in enumerate(prompt[1:])]
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(theirs, abs=1e-4)
        assert logprobs["token_logprobs"][-1] == pytest.approx(expected[-1].max().item(), abs=1e-4)
        best = [max(entry.values()) for entry in logprobs["top_logprobs"][1:]]
        assert best == pytest.approx(expected.max(dim=-1).values.tolist(), abs=1e-4)
        assert len(logprobs["tokens"]) == len(prompt) + 1
        assert choice["text"].startswith("".join(logprobs["tokens"][:-1]))


def test_scores_without_an_answer(http):
    status, body = complete(http, "dora", max_tokens=0, echo=True, logprobs=1)
    assert status == 200
    assert body["choices"][0]["text"] == PROMPT
    assert body["choices"][0]["finish_reason"] == "length"
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(PROMPT)
    assert body["usage"]["completion_tokens"] == 0


def test_routed_experts_come_on_request(http, saved):
    engine = CompareEngine(saved[0], saved[1], device="cpu")
    updates = list(engine.stream(PROMPT, Sampling(5), columns=[engine.columns[1]]))
    _, body = chat(http, "mix", max_tokens=5, return_routed_experts=True)
    routed = body["choices"][0]["routed_experts"]
    assert [token["experts"] for token in routed] == [[list(layer) for layer in u.experts] for u in updates]
    assert routed[0]["weights"][0] == pytest.approx(updates[0].expert_weights[0], abs=1e-5)
    assert chat(http, "dora", max_tokens=2, return_routed_experts=True)[1]["choices"][0]["routed_experts"] == [None] * 2
    assert "routed_experts" not in chat(http, "mix", max_tokens=2)[1]["choices"][0]


def test_an_event_is_one_line_for_every_client():
    """str.splitlines, by which httpx reads lines, splits at more characters than the standard of events."""
    text = "a\u2028b\u2029c\x85d\n"
    (line, _, rest) = event({"text": text}).splitlines(keepends=True)[0].partition("\n")
    assert json.loads(line.removeprefix("data: ")) == {"text": text}
    assert not rest


def events(response):
    """The data of a stream's events; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole(http, n):
    whole = chat(http, "mix", max_tokens=20, n=n, temperature=0.7, seed=3)[1]
    request = {"model": "mix", "messages": CHAT, "max_tokens": 20, "n": n, "temperature": 0.7, "seed": 3}
    request |= {"stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
    texts = [""] * n
    for chunk in found[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"]["content"]
        assert chunk["usage"] is None
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in found}) == 1


def test_a_stream_of_a_completion_has_the_echo_and_the_logprobs(http):
    fields = {"max_tokens": 6, "echo": True, "logprobs": 2}
    whole = complete(http, "lora", **fields)[1]["choices"][0]
    request = {"model": "lora", "prompt": PROMPT, "temperature": 0, "stream": True, **fields}
    with http.stream("POST", "/v1/completions", json=request) as response:
        choices = [chunk["choices"][0] for chunk in events(response)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, values in whole["logprobs"].items():
        parts = [value for choice in choices for value in choice["logprobs"][name]]
        assert (
            parts == (pytest.approx(values, abs=1e-5) if name == "token_logprobs" else values) or name == "top_logprobs"
        )


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"max_completion_tokens": 5}, 400, "max_completion_tokens"),  # beside max_tokens=4
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "", "tool_calls": [1]}]}, 400, "messages.1.tool_calls"),
        ({"repetition_penalty": 1e-40}, 400, "repetition_penalty"),
        ({"top_k": 2**63}, 400, "top_k"),
        ({"stop": 1}, 400, "stop"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "messages"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"n": 0}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"stop": [""]}, 400, "stop"),
        ({"seed": 0.5}, 400, "seed"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"min_p": 0.1}, 400, "min_p"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(http, fields, status, param):
    got, body = chat(http, **{"max_tokens": 4, **fields})
    assert got == status, body
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me"},
        {"n": None, "stop": None, "return_routed_experts": None},
        {"tools": []},
        {"logit_bias": None},
        {"messages": [{"role": "user", "content": PROMPT, "tool_calls": None, "refusal": ""}]},
        {"stream": False, "stream_options": None},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(http, fields):
    assert chat(http, max_tokens=2, **fields)[0] == 200
    assert complete(http, max_tokens=2, echo=None)[0] == 200


def test_a_temperature_that_divides_beyond_float32_is_greedy(http):
    choices = [chat(http, max_tokens=9, temperature=value)[1]["choices"] for value in (0, 1e-39, 1e-300)]
    assert choices[0] == choices[1] == choices[2]


def test_a_special_token_ends_an_answer_as_a_stop_text(http):
    """It is never part of the text, in which other stop texts are found."""
    request = {"n": 12, "max_tokens": 40, "temperature": 1.5, "seed": 2, "logprobs": 0}
    ended = 0
    for choice in complete(http, "base", stop=["<|assistant|>"], **request)[1]["choices"]:
        tokens = choice["logprobs"]["tokens"]
        assert "<|assistant|>" not in tokens[:-1]
        if tokens[-1] == "<|assistant|>":
            assert choice["finish_reason"] == "stop"
            ended += 1
    assert ended


@pytest.mark.parametrize("prompt", ["", [], [[]], [-1], [10**6], [10**30], [1.5], [["a"]], {"text": "a"}, [1, "a"]])
def test_prompts_that_cannot_be_read_are_refused(http, prompt):
    status, body = complete(http, prompt=prompt, max_tokens=2)
    assert status == 400, body
    assert body["error"]["param"].startswith("prompt")


def test_broken_requests(http):
    kind = {"Content-Type": "application/json"}
    assert http.post("/v1/completions", content=b"{", headers=kind).status_code == 400
    assert http.post("/v1/completions", content=b"[]", headers=kind).status_code == 400
    form = http.post("/v1/completions", content=b'{"model": "mix", "prompt": "x"}')  # as curl -d without a header
    assert form.status_code == 400
    assert "Content-Type='': must be application/json" in form.json()["error"]["message"]
    for surrogate in (b'{"model": "mix", "prompt": "\\ud800"}', b'{"model": "mix", "prompt": "x", "\\udfff": 1}'):
        refused = http.post("/v1/completions", content=surrogate, headers=kind)
        assert refused.status_code == 400, refused.text
        assert "lone surrogates" in refused.json()["error"]["message"]
    assert http.get("/v1/completions").json()["error"]["message"] == "GET /v1/completions: Method Not Allowed"
    assert http.get("/v1/nothing").status_code == 404
    assert "error" in http.get("/v1/nothing").json()
    large = http.post("/v1/completions", content=b" " * (MOST_BODY_BYTES + 1), headers=kind)
    assert large.status_code == 413
    pieces = (b" " * 2**20 for _ in range(MOST_BODY_BYTES // 2**20 + 1))
    assert http.post("/v1/completions", content=pieces, headers=kind).status_code == 413


def test_health_and_metrics(http):
    chat(http, "dora", max_tokens=3)
    assert http.get("/health").status_code == http.head("/health").status_code == 200
    complete(http, n=0)
    wait_until(lambda: "minilora_cache_bytes 0\n" in http.get("/metrics").text)  # freed before the next step
    text = http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['minilora_requests_total{endpoint="/v1/chat/completions",model="dora",status="200"}']) >= 1
    assert float(values['minilora_requests_total{endpoint="/v1/completions",model="",status="400"}']) >= 1
    assert float(values['minilora_generated_tokens_total{model="dora"}']) >= 3
    assert float(values['minilora_time_to_first_token_seconds_bucket{model="dora",le="+Inf"}']) >= 1
    assert float(values['minilora_adapter_bytes{model="mix"}']) > 0
    assert values["minilora_rows_running"] == values["minilora_rows_waiting"] == "0"


def test_the_key_is_required(saved):
    engine = CompareEngine(saved[0], device="cpu")
    with served(engine, api_key="sécret") as (_, address):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sécret".encode()}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                refused = httpx.get(address + path, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(address + "/health").status_code == 200
        key = {"Authorization": b"Bearer " + "sécret".encode()}
        assert httpx.get(address + "/v1/models", headers=key).status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(running):
    """The command of docs/serve.md, whole and as a stream, and an error."""

    def curl(*arguments, **fields):
        body = json.dumps({"model": "dora", "messages": CHAT, "temperature": 0, "max_tokens": 6} | fields)
        command = ["curl", "-sS", *arguments, f"{running[1]}/v1/chat/completions"]
        command += ["-H", "Content-Type: application/json", "-d", body]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    whole = json.loads(curl())["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in curl("-N", stream=True).splitlines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines) == whole
    assert curl("-o", "/dev/null", "-w", "%{http_code}", model="nobody") == "404"
