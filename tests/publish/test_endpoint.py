"""`push --endpoint`: the handler answers where minilora_hub is missing, and belongs to the published code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_stand_ins
from formats.helpers import edit_json
from safetensors.torch import load_file, save_file
from transformers import pipeline

from minilora_hub import push
from minilora_hub.adapter_folder.code import code_files, code_hash, endpoint_files, release_of
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.find import info
from minilora_hub.publish.push.build import build
from minilora_hub.publish.verify.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOOLKIT = Path(__file__).with_name("endpoint_toolkit.py")
FILES = {"handler.py", "requirements.txt"}
TEXTS = ["Colour of the sky?", "and of grass"]
CHAT = [{"role": "user", "content": "Hello!"}]
GREEDY = {"max_new_tokens": 12}
# A body, and what the error must say: the name, and the value or the bound.
REFUSED = [
    ({}, "the request must be an object with 'inputs', not {}"),
    ([1], "must be an object with 'inputs'"),
    ({"inputs": ""}, "every text must be a non-empty string"),
    ({"inputs": []}, "a list of 1 to 32 such, not 0 of them"),
    ({"inputs": ["x"] * 33}, "not 33 of them"),
    ({"inputs": 5}, "chat messages, or a list of 1 to 32 such, not 5"),
    ({"inputs": ["x", CHAT]}, "must not mix the two"),
    ({"inputs": [{"role": "user"}]}, "every chat a list of messages"),
    ({"inputs": "x", "stream": True}, "stream=True: is not supported"),
    ({"inputs": "x", "parameters": [1]}, "parameters=[1]: must be an object"),
    ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, "max_new_tokens=0: must be an integer from 1"),
    ({"inputs": "x", "parameters": {"max_new_tokens": True}}, "max_new_tokens=True: must be an integer"),
    ({"inputs": "x", "parameters": {"temperature": 0}}, "temperature=0: must be a number from 0.01"),
    ({"inputs": "x", "parameters": {"temperature": "hot"}}, "temperature='hot': must be a number"),
    ({"inputs": "x", "parameters": {"top_p": 1.5}}, "top_p=1.5: must be a number from 0.0001 to 1"),
    ({"inputs": "x", "parameters": {"do_sample": 1}}, "do_sample=1: must be true or false"),
    ({"inputs": "x", "parameters": {"stop": [""]}}, "stop=['']: must be at most 16 non-empty texts"),
    ({"inputs": "x", "parameters": {"custom_generate": "a/b"}}, "custom_generate='a/b': is not supported; these are:"),
    ({"inputs": "x", "parameters": {"max_new_tokens": 512}}, "a prompt has 1 tokens and max_new_tokens is 512"),
    ({"inputs": "x" * 600}, "a prompt has 600 tokens"),
    ({"inputs": "x", "parameters": {"num_return_sequences": 2, "do_sample": False}}, "needs do_sample"),
    ({"inputs": ["x"] * 9, "parameters": {"num_return_sequences": 8}}, "9 inputs with 8 answers each: at most 64"),
    ({"inputs": CHAT, "parameters": {"return_full_text": True}}, "return_full_text: must not be true for chat"),
]


def called(folder: Path, bodies: list) -> list:
    """Return the answers of a folder's handler, in a process of its own with no module of ours on its path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error::UserWarning", str(TOOLKIT), str(folder)],
        input="".join(json.dumps(body) + "\n" for body in bodies),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def built(trained, base_folder, tmp_path):
    """Build a published folder with an endpoint."""

    def of(method: str) -> Path:
        out = tmp_path / f"{method}-endpoint"
        return build(trained[method], out, repo_id="ana/a", base_model=str(base_folder), endpoint=True).folder

    return of


def reference(folder: Path, base_folder: Path, method: str):
    """The pipeline of transformers over the installed classes, or over PEFT."""
    from peft import PeftModel

    import minilora_hub

    classes = {"dora": minilora_hub.DoraForCausalLM, "mixlora": minilora_hub.MixLoraForCausalLM}
    if method == "lora":
        model = PeftModel.from_pretrained(tiny_stand_ins.tiny_llama(), folder).merge_and_unload()
    else:
        model = classes[method].from_pretrained(folder, base_model=str(base_folder))
    answer = pipeline("text-generation", model=model, tokenizer=tiny_stand_ins.byte_tokenizer())
    return lambda inputs: answer(inputs, do_sample=False, return_full_text=False, **GREEDY)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("dora", "lora", "mixlora")]


@pytest.mark.parametrize("method", SLOW)
def test_the_handler_answers_without_minilora_hub(hub, built, base_folder, method):
    folder = built(method)
    expected = reference(folder, base_folder, method)
    first = expected(TEXTS[0])[0]["generated_text"]
    stop = first[4:6]
    sampling = {"inputs": TEXTS[0], "parameters": {"temperature": 1.5, "seed": 7, "num_return_sequences": 2, **GREEDY}}
    whole = {"inputs": TEXTS[0], "parameters": {**GREEDY, "return_full_text": True, "watermark": False, "top_k": None}}
    bodies = [
        {"inputs": TEXTS[0], "parameters": GREEDY},
        {"inputs": TEXTS, "parameters": GREEDY},
        {"inputs": CHAT, "parameters": GREEDY},
        {"inputs": [CHAT, CHAT], "parameters": GREEDY},
        whole,
        sampling,
        sampling,
        {"inputs": TEXTS[0]},
        {"inputs": TEXTS[0], "parameters": {**GREEDY, "stop": [stop]}},
        *(body for body, _ in REFUSED),
        {"inputs": TEXTS[0], "parameters": GREEDY},
    ]
    *valid, last = called(folder, bodies)
    valid, refused = valid[:9], valid[9:]
    text, texts, chat, chats, full, sampled, again, default, stopped = valid
    assert text == last == expected(TEXTS[0])
    assert texts == [expected(part) for part in TEXTS]
    assert chat == expected(CHAT)
    assert chats == [chat, chat]
    assert full == [{"generated_text": TEXTS[0] + text[0]["generated_text"]}]
    assert sampled == again
    assert len({entry["generated_text"] for entry in sampled}) == 2
    assert default[0]["generated_text"].startswith(first)
    assert stopped[0]["generated_text"] == first.partition(stop)[0]
    for (body, message), answer in zip(REFUSED, refused, strict=True):
        assert answer["kind"] == "ValueError", answer
        assert message in answer["error"], body


@pytest.mark.slow
def test_a_base_that_lacks_a_tensor_is_refused(built, base_folder, tmp_path):
    """Of a LoRA: PEFT and transformers would fill it with random numbers."""
    folder, damaged = built("lora"), tmp_path / "damaged"
    shutil.copytree(base_folder, damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(damaged))
    done = subprocess.run([sys.executable, "-P", str(TOOLKIT), str(folder)], input="", capture_output=True, text=True)
    assert done.returncode != 0
    assert "its checkpoint lacks model.layers.1.mlp.up_proj.weight" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_handler_is_published_code(built, base_folder, method, process):
    folder = built(method)
    assert release_of(code_hash(code_files(folder))) == "this version"
    assert info(folder).code == "this version"
    report = verify(folder, base_model=str(base_folder), process=process)
    assert report.ok, report.problem
    known = {"base_exists": lambda *_: True, "base_license": lambda *_: "apache-2.0"}
    assert [problem for problem in check_folder(folder, **known) if problem.blocking] == []
    card = (folder / "README.md").read_text()
    assert "An Inference Endpoint made from it installs `requirements.txt` and runs `handler.py`." in card
    assert all(f"| `{name}` | `" in card for name in FILES)
    for name in FILES:
        changed = shutil.copytree(folder, folder.with_name(f"changed-{name}"))
        changed.joinpath(name).write_text((folder / name).read_text() + "# changed\nimport socket\n")
        problems = {(problem.code, problem.file) for problem in check_folder(changed, **known) if problem.blocking}
        assert ("code-differs", name) in problems
        steps = {step.name: step for step in verify(changed, base_model=str(base_folder), process=process).steps}
        assert not steps["code"].ok
        assert "loading" not in steps
        changed.joinpath(name).unlink()
        problems = {(problem.code, problem.file) for problem in check_folder(changed, **known)}
        assert ("missing-file", name) in problems


def test_an_endpoint_stays_until_it_is_taken_out(hub, monkeypatch, trained):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    arguments = {"verify": False, "progress": False}

    def there(repo):
        return FILES & set(hub.repo(repo).files("main"))

    for method in ("dora", "lora"):
        repo = f"ana/{method}"
        push(trained[method], repo, **arguments)
        assert there(repo) == set()
        push(trained[method], repo, endpoint=True, **arguments)
        assert there(repo) == FILES
        for name, path in endpoint_files(method == "lora").items():
            assert hub.repo(repo).files("main")[name] == path.read_bytes()
        again = push(trained[method], repo, **arguments)
        assert again.plan.sends == ()
        push(trained[method], repo, endpoint=False, **arguments)
        assert there(repo) == set()


def test_requirements_are_those_of_the_package():
    import tomllib

    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    for peft in (False, True):
        wanted = endpoint_files(peft)["requirements.txt"].read_text().split()
        assert set(wanted) <= set(project["dependencies"])
        assert any(line.startswith("peft") for line in wanted) == peft
