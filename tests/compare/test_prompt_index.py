"""Choosing an adapter by the prompt: vectors, choice, file, the commands of docs/route.md, the server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from commands import run_command  # noqa: F401  a fixture
from serving.conftest import served
from tiny_stand_ins import byte_tokenizer, tiny_llama
from tiny_training import write_base, write_rows

from minilora_hub.cli import main
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.compare.prompt_index import AdapterIndex, choose_in, embedding
from minilora_hub.errors import AdapterError, DataError
from minilora_hub.remote_code.adapter_files import base_fingerprint
from minilora_hub.serving.run import build_server
from minilora_hub.training.prompts import read_prompts, trained_on

PAGE = Path(__file__).parents[2] / "docs" / "route.md"
DATES = [f"Write as YYYY-MM-DD: the {day}th of May 19{day}9" for day in range(4, 10)]
NUMBERS = [f"Write in digits: {word}ty-two" for word in ("for", "six", "seven", "eigh", "nine")]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def index_of(model, prompts=None) -> AdapterIndex:
    prompts = prompts or {"mix": ("there/mix", DATES), "dora": ("me/dora", NUMBERS), "lora": ("lora", ["???", "!!!"])}
    return AdapterIndex.build(model, byte_tokenizer(), "base", "sha256:1", prompts)


def test_the_choice_is_the_nearest_prompts_adapter(model):
    """Against the definition: last hidden states from the whole model, their mean, cosines in float64."""

    def vector(text):
        ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        mean = hidden[0].double().mean(0)
        return mean / mean.norm()

    index = index_of(model)
    asked = "Write as YYYY-MM-DD: the 11th of May 1949"
    near = {
        name: max((vector(asked) @ vector(text)).item() for text in texts)
        for name, texts in (("mix", DATES), ("dora", NUMBERS), ("lora", ["???", "!!!"]))
    }
    choice = index.choose(embedding(model, byte_tokenizer(), asked))
    (first, second, _) = sorted(near, key=lambda name: -near[name])
    assert (
        (choice.adapter, choice.source, choice.runner_up[0])
        == (first, "there/mix", second)
        == ("mix", "there/mix", second)
    )
    assert choice.similarity == pytest.approx(near[first], abs=1e-5)
    assert choice.runner_up[1] == pytest.approx(near[second], abs=1e-5)
    assert index.choose(embedding(model, byte_tokenizer(), asked), ["lora"]).runner_up is None
    long = "x" * 600
    torch.testing.assert_close(
        embedding(model, byte_tokenizer(), long * 20), embedding(model, byte_tokenizer(), long[:512]), rtol=0, atol=0
    )
    for name, text in (("dora", "Write in digits: fifty-two"), ("lora", "????")):
        assert index.choose(embedding(model, byte_tokenizer(), text)).adapter == name


def test_the_file_holds_vectors_and_no_text(model, tmp_path):
    index = index_of(model)
    index.save(tmp_path / "my.index")
    content = (tmp_path / "my.index").read_bytes()
    assert b"YYYY" not in content
    found = AdapterIndex.load(tmp_path / "my.index")
    assert (found.base, found.fingerprint, found.adapters) == (index.base, index.fingerprint, index.adapters)
    assert torch.equal(found.vectors, index.vectors)
    assert torch.equal(found.owners, index.owners)
    found.require_base("unknown")
    with pytest.raises(AdapterError, match="fingerprint sha256:1, and this base has sha256:2: build it again"):
        found.require_base("sha256:2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "cannot be read"),
        (lambda content: content.replace(b'\\"format\\": 1', b'\\"format\\": 9'), "format=9: this version reads 1"),
        (lambda content: content.replace(b'\\"prompts\\": 6', b'\\"prompts\\": 7'), "its parts do not fit each other"),
        (lambda content: content.replace(b"minilora_index", b"minilora_other"), "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused(change, message, model, tmp_path):
    index_of(model).save(tmp_path / "my.index")
    content = (tmp_path / "my.index").read_bytes()
    assert change(content) != content
    (tmp_path / "my.index").write_bytes(change(content))
    with pytest.raises(AdapterError, match=message):
        AdapterIndex.load(tmp_path / "my.index")


def test_nothing_to_choose_from_is_refused(model):
    with pytest.raises(AdapterError, match="1 adapter: there must be at least 2"):
        index_of(model, {"a": ("a", DATES)})
    with pytest.raises(AdapterError, match="adapter 'b': there are no prompts of it"):
        index_of(model, {"a": ("a", DATES), "b": ("b", [])})
    with pytest.raises(AdapterError, match="index: it has none of the adapters other"):
        index_of(model).choose(index_of(model).vectors[0], ["other"])
    with pytest.raises(ValueError, match="must hold at least one token"):
        embedding(model, byte_tokenizer(), "")


def test_prompts_of_rows_are_what_the_user_says_last(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "old"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "c"},
            ]
        },
        {"prompt": "three", "completion": "d"},
        {"prompt": [{"role": "user", "content": "four"}], "completion": [{"role": "assistant", "content": "e"}]},
        {"text": "five"},
    ]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    assert read_prompts([file], 9) == ["one", "two", "three", "four", "five"]
    assert read_prompts([file], 2) == ["one", "three"]
    (tmp_path / "lines.txt").write_text("six\n\nseven\n", encoding="utf-8-sig")
    assert read_prompts([str(tmp_path / "lines.txt")], 9) == ["six", "seven"]


def test_prompts_are_those_of_the_run_that_skipped_bad_rows(tmp_path):
    data = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "one", "completion": "a"}, {"prompt": "two"}]))
    (tmp_path / "training.yaml").write_text(f"data: [{data}]\nskip_bad_rows: true\ndata_split: test\n")
    read = trained_on(tmp_path)
    assert (read["split"], read["revision"]) == ("test", None)
    assert read_prompts(count=9, **read) == ["one"]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: has no completion"):
        read_prompts([data], 9)


def rows_of(prompts, answer) -> list[dict]:
    return [{"prompt": text, "completion": f"{answer} {number}"} for number, text in enumerate(prompts)]


@pytest.mark.slow
def test_the_commands_of_the_page(run_command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    base = write_base(tmp_path / "base")
    write_rows(tmp_path / "dates.jsonl", rows_of(DATES, "day"))
    write_rows(tmp_path / "numbers.jsonl", rows_of(NUMBERS, "number"))
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    printed = []
    for command in block.strip().splitlines():
        arguments = shlex.split(command.replace("--base embedded", f"--base {base}"))[1:]
        if arguments[0] == "train":
            arguments += ["--max-steps", "1"]
        if arguments[0] == "compare":
            arguments += ["--json", "--max-new-tokens", "3"]
        done = run_command(*arguments)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    assert printed[2] == "my.index\n"
    first, second = printed[3].splitlines()
    assert re.fullmatch(
        r"dates: similarity 0\.\d{3}, then numbers with 0\.\d{3}  +Write as YYYY-MM-DD: the third.*", first
    )
    assert re.match(r"numbers: similarity 1\.000, then dates with 0\.\d{3}", second)
    report = json.loads(printed[4])
    assert [column["name"] for column in report["columns"]] == ["base", "dates"]
    assert report["route"]["adapter"] == "dates"
    assert report["route"]["runner_up"]["adapter"] == "numbers"
    asked = run_command("route", "ask", "my.index", "--prompt", "Write in digits: sixty-one", "--json")
    (found,) = json.loads(asked.stdout)
    assert (found["adapter"], found["prompt"]) == ("numbers", "Write in digits: sixty-one")
    for place in ("dates", "nowhere/o.index"):
        refused = run_command("route", "build", "dates", "numbers", "--out", place)
        assert f"--out {place}: must be a file in a folder that exists" in refused.stderr
    refused = run_command("route", "build", "dates", "numbers", "--prompts", "dates.jsonl", "--out", "o.index")
    assert "1 files for 2 adapters" in refused.stderr
    (tmp_path / "dates" / "training.yaml").unlink()
    refused = run_command("route", "build", "dates", "numbers", "--out", "o.index")
    assert "adapter 'dates': its folder does not say what it was trained on" in refused.stderr
    assert not (tmp_path / "o.index").exists()


def test_an_index_works_in_other_folders_than_it_was_built_in(saved, tmp_path, monkeypatch, capsys):
    """Base and adapters were named by relative paths."""
    base, (mix, dora, _) = saved
    for name in ("dates", "numbers"):
        (tmp_path / f"{name}.txt").write_text("\n".join(DATES if name == "dates" else NUMBERS))
    monkeypatch.chdir(base.parent)
    adapters = [str(folder.relative_to(base.parent)) for folder in (mix, dora)]
    prompts = [part for name in ("dates", "numbers") for part in ("--prompts", str(tmp_path / f"{name}.txt"))]
    index = str(tmp_path / "my.index")
    for command in (
        ["route", "build", *adapters, *prompts, "--base", base.name, "--out", index],
        ["route", "ask", index, "--json", "-p", DATES[0]],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        monkeypatch.chdir("/")
    (found,) = json.loads(printed)
    assert found["adapter"] == "mix"
    assert AdapterIndex.load(Path(index)).base == str(base)


def test_what_is_no_text_is_refused_before_anything_is_loaded(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["route", "ask", str(tmp_path / "missing.index"), "-p", "\udc80"])
    assert ended.value.code == 1
    assert "--prompt: must not contain lone surrogates" in capsys.readouterr().err


def test_the_server_answers_auto_with_the_chosen_adapter(saved):
    base, adapters = saved
    engine = CompareEngine(base, adapters, device="cpu")
    index = index_of(tiny_llama())
    assert choose_in(engine, index, DATES[0]).similarity == pytest.approx(1, abs=1e-5)
    with served(engine, adapters) as (server, address), httpx.Client(base_url=address, timeout=60) as http:
        said = {"model": "auto", "max_tokens": 6, "temperature": 0}
        assert http.post("/v1/completions", json=said | {"prompt": "Hi"}).status_code == 404
        server.models.choose_with(index)
        for name, prompt in (("mix", DATES[2]), ("dora", NUMBERS[1])):
            chat = [{"role": "user", "content": prompt}]
            ours = http.post("/v1/chat/completions", json=said | {"messages": chat}).json()
            asked = http.post("/v1/chat/completions", json=said | {"messages": chat, "model": name}).json()
            assert ours["choices"] == asked["choices"]
            assert (ours["model"], ours["route"]["adapter"], "route" in asked) == (name, name, False)
            assert ours["route"]["similarity"] == pytest.approx(1, abs=1e-4)
        text = http.post("/v1/completions", json=said | {"prompt": NUMBERS[0], "stream": True}).text
        assert '"model": "dora", "route": {"adapter": "dora"' in text
        many = http.post("/v1/completions", json=said | {"prompt": ["a", "b"]})
        assert (many.status_code, many.json()["error"]["message"][:24]) == (400, "prompt: must be one text")
        models = {model["id"]: model["kind"] for model in http.get("/v1/models").json()["data"]}
        assert models["auto"] == http.get("/v1/models/auto").json()["kind"] == "auto"
        load = http.post("/v1/load_lora_adapter", json={"lora_name": "auto", "lora_path": str(adapters[0])})
        assert load.status_code == 400
        engine.unload("mix")  # the chosen one is always one that is served
        ours = http.post("/v1/completions", json=said | {"prompt": DATES[0]}).json()
        assert ours["model"] in ("dora", "lora")
        with pytest.raises(AdapterError, match="its adapters mix are not served"):
            server.models.choose_with(index)


def test_a_server_is_built_with_an_index_of_its_base(saved, tmp_path):
    base, adapters = saved
    index_of(tiny_llama()).save(tmp_path / "other.index")
    with pytest.raises(AdapterError, match="build it again"):
        build_server(str(base), adapters, route=tmp_path / "other.index")
    replace(index_of(tiny_llama()), fingerprint=base_fingerprint(str(base))).save(tmp_path / "my.index")
    server = build_server(str(base), adapters, route=tmp_path / "my.index")
    assert server.models.all()[-1].name == "auto"
    with pytest.raises(AdapterError, match="a model is called 'auto'"):
        build_server(
            str(base), [*adapters, shutil.copytree(adapters[0], tmp_path / "auto")], route=tmp_path / "my.index"
        )
