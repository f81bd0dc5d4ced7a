"""What leads to code is found wherever it is written, and every loading says that code is not trusted."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import tiny_stand_ins

from minilora_hub.adapter_folder.code_references import LARGEST, code_references, require_no_other_code
from minilora_hub.adapter_folder.tasks import own_auto_map
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.errors import AdapterError, BaseModelError

PACKAGE = Path(__file__).parents[2] / "minilora_hub"
OURS = {"model_type": "dora", "auto_map": own_auto_map("dora")}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"config.json": OURS | {"auto_map": {"AutoConfig": "a/b--c.D"}}}, "names 'a/b--c.D': code of another repo"),
        ({"config.json": OURS | {"auto_map": {"AutoConfig": "gone.D"}}}, "there is no gone.py beside it"),
        ({"config.json": OURS | {"auto_map": {"AutoConfig": "../x.D"}}}, "that is no module.Class"),
        ({"config.json": OURS | {"auto_map": {"AutoConfig": 7}}}, "that is no module.Class"),
        ({"config.json": OURS | {"text_config": {"auto_map": {"AutoModel": "a/b--c.D"}}}}, "code of another repo"),
        ({"config.5.0.json": {"auto_map": {"AutoConfig": "a/b--c.D"}}}, "config.5.0.json: auto_map names"),
        ({"Config.JSON": {"auto_map": {"AutoConfig": "a/b--c.D"}}}, "Config.JSON: auto_map names"),
        ({"config.json": '{"auto_map": {"A": "a/b--c.D"}, "auto_map": {}}'}, "code of another repo"),
        ({"config.json": '{"\\u0061uto_map": {"A": "a/b--c.D"}}'}, "code of another repo"),
        ({"config.json": '{"a": NaN, "auto_map": {"A": "a/b--c.D"}}'}, "code of another repo"),
        ({"config.json": '{"auto_map": {"A": "a/b--c.D"}, "a": ' + "[" * 100_000}, "nested too deeply"),
        ({"tokenizer_config.json": {"auto_map": ["a/b--c.D", None]}}, "tokenizer_config.json: auto_map names"),
        ({"processor_config.json": {"auto_map": {"AutoProcessor": "a/b--c.D"}}}, "code of another repo"),
        ({"preprocessor_config.json": {"auto_map": {"AutoImageProcessor": {"pil": "a/b--c.D"}}}}, "another repo"),
        ({"generation_config.json": {"custom_generate": "a/b"}}, "custom_generate='a/b' names code"),
        ({"custom_generate/generate.py": ""}, "custom_generate/: holds code"),
        ({"config.json": OURS | {"attn_implementation": "a/kernel"}}, "names a kernel on the Hub"),
        ({"config.json": OURS | {"_attn_implementation": {"": "paged|a/kernel@v1"}}}, "names a kernel on the Hub"),
        ({"adapter_config.json": {"megatron_config": {"a": 1}, "megatron_core": "this"}}, "makes PEFT import"),
        ({"peft/adapter_config.json": {"megatron_config": {"a": 1}}}, "peft/adapter_config.json: megatron_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_what_leads_elsewhere_is_refused(tmp_path, files, told):
    with pytest.raises(AdapterError, match="is not loaded: ") as refused:
        require_no_other_code(write(tmp_path, files))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_an_adapter_needs_is_its_own(tmp_path):
    """Our two kinds in config.json, with or without their files; other code only where it lies in the folder."""
    config = OURS | {"attn_implementation": "sdpa", "text_config": {"model_type": "llama"}}
    write(
        tmp_path,
        {"config.json": config, "generation_config.json": {"max_length": 9}, "tokenizer_config.json": "no JSON"},
    )
    (reference,) = code_references(tmp_path)
    assert reference.own
    require_no_other_code(tmp_path)
    write(tmp_path, {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["mine.Slow", None]}}, "mine.py": ""})
    (_, other) = code_references(tmp_path)
    assert (other.own, other.problem) == (False, None)
    require_no_other_code(tmp_path)
    assert own_auto_map("mixlora")["AutoModel"] == "modeling_minilora.MixLoraModel"
    assert own_auto_map("llama") is None
    with pytest.raises(AdapterError, match=r"config\.json: auto_map names 'configuration_minilora\.DoraConfig'"):
        require_no_other_code(write(tmp_path, {"config.json": OURS | {"model_type": "llama"}}))


def test_a_huge_configuration_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(AdapterError, match="has 67,108,865 bytes: it is not read"):
        require_no_other_code(tmp_path)


def test_a_base_with_code_of_its_own_is_saved_without_a_pointer_to_it(tmp_path):
    """Its adapter's config.json would otherwise lead to a module that is not in the adapter's repo."""
    from minilora_hub import DoraConfig, DoraForCausalLM

    base = tiny_stand_ins.tiny_llama()
    base.config.auto_map = {"AutoConfig": "configuration_other.OtherConfig"}
    DoraForCausalLM.from_base(base, DoraConfig(r=2)).save_pretrained(
        tmp_path, tokenizer=tiny_stand_ins.byte_tokenizer()
    )
    require_no_other_code(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())["text_config"]


def test_a_bases_own_code_is_never_asked_for(tmp_path, monkeypatch):
    """transformers would ask on the terminal, and run it after a "y"."""
    write(tmp_path, {
        "config.json": {"model_type": "other", "auto_map": {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X"}},
        "evil.py": f"open({str(tmp_path / 'it ran')!r}, 'w').close()\nclass X: ...\n",
        "model.safetensors": "",
    })  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(BaseModelError, match="custom code"):
        load_base(resolve_base(tmp_path))
    assert not (tmp_path / "it ran").exists()


def auto_class_calls():
    """Every call of an Auto class that may import code, as (file, line, its keywords)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, _, method = ast.unparse(node.func).lower().rpartition(".")
            if method == "load_checked" or (method in ("from_pretrained", "from_config") and "auto" in called):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", {word.arg: word.value for word in node.keywords}


def test_every_loading_says_whether_code_is_trusted():
    """Left out, it means: ask. Only three trust: `verify` in its own process, a model of ours if its caller does, and
    the handler of an endpoint, which is code of the same repo and runs only there.
    """
    calls = list(auto_class_calls())
    assert len(calls) > 10
    assert [place for place, words in calls if "trust_remote_code" not in words] == []
    trusting = [place.split(":")[0] for place, words in calls if ast.unparse(words["trust_remote_code"]) != "False"]
    assert trusting == [
        "adapter_folder/endpoint/handler.py",
        "publish/verify/isolated_worker.py",
        "remote_code/base_loading.py",
    ]
