"""Publish to a Hub over HTTP, load in a process that has never heard of minilora_hub: one line, same logits."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub.server import HubServer
from tiny import METHODS, tiny_base
from tiny_stand_ins import byte_tokenizer

pytestmark = pytest.mark.slow  # processes of an author and of strangers

ADAPTERS = {method: (method, {}) for method in METHODS} | {
    "top_p": ("mixlora", {"routing_strategy": "top_p"}),
    "switch": ("mixlora", {"routing_strategy": "switch", "router_sparse_step": 2}),
}
"""Name of the repo -> method and what its configuration says besides."""

STRANGER = """
import sys
sys.modules["minilora_hub"] = None  # importing it fails, as where it is not installed
import json, peft, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
"""

AUTHOR = """
import json, sys, torch
from transformers import AutoTokenizer
from tiny import CAUSAL_LM, fill_adapter, tiny_config
folder, facts = sys.argv[1], {}
ids = AutoTokenizer.from_pretrained("org/base")("Hello Hub", return_tensors="pt").input_ids
for name, (method, changes) in json.loads(sys.argv[2]).items():
    model = CAUSAL_LM[method].from_base("org/base", tiny_config(method, **changes))
    fill_adapter(model, seed=1)
    model.eval()
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, f"{folder}/{name}.pt")
    model.push_to_hub(f"author/{name}")
    facts[name] = {"revision": model.config.base_model_revision, "fingerprint": model.config.base_fingerprint}
print(json.dumps(facts))
"""

LOAD = """
def load(repo, arguments, out):
    # Transformers reads config.json for the tokenizer too, and would ask on the terminal without the flag.
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True, **arguments)
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **arguments)
    body = AutoModel.from_pretrained(repo, trust_remote_code=True, **arguments)
    expected = torch.load(out)
    assert torch.equal(tokenizer("Hello Hub", return_tensors="pt").input_ids, expected["ids"])
    with torch.no_grad():
        got = model(expected["ids"]).logits
        hidden = body(expected["ids"]).last_hidden_state
    generate = pipeline("text-generation", model=repo, trust_remote_code=True, **arguments)
    text = generate("Hello Hub", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    again = model.generate(expected["ids"], max_new_tokens=5, do_sample=False)[0, expected["ids"].shape[1]:]
    return {
        "equal": torch.equal(got, expected["logits"]),
        "module": type(model).__module__,
        "classes": [type(model).__name__, type(body).__name__, type(model.base).__name__],
        "pipeline": text == tokenizer.decode(again, skip_special_tokens=True),
        "revision": model.config.base_model_revision,
        "body": list(hidden.shape),
        "ours": [name for name in sys.modules if name.startswith("minilora_hub") and sys.modules[name]],
    }

print(json.dumps([load(*one) for one in json.loads(sys.argv[1])]))
"""


def run(script, *arguments, environment, folder):
    """Run a script in its own process, warnings being errors there too; its last line, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with a base, and one adapter of each method that their author pushed from a process of their own."""
    folder = tmp_path_factory.mktemp("hub")
    base = folder / "base"
    tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    with HubServer() as hub:
        hub.add_repo("org/base", files={path.name: path.read_bytes() for path in base.iterdir()})
        token = hub.add_user("author")
        environment = hub.environment(token=token, cache_dir=folder / "author")
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        code, out, err = run(AUTHOR, folder, json.dumps(ADAPTERS), environment=environment, folder=folder)
        assert code == 0, err[-3000:]
        yield hub, token, folder, json.loads(out.splitlines()[-1])


def load(published, *adapters, more="", token=True, folder_name="stranger"):
    """Load adapters, each with arguments, in one process; what comes after them may fail there."""
    hub, secret, folder, _ = published
    environment = hub.environment(token=secret if token else None, cache_dir=folder / folder_name)
    jobs = [(f"author/{name}", arguments, str(folder / f"{name}.pt")) for name, arguments in adapters]
    return run(STRANGER + LOAD + more, json.dumps(jobs), environment=environment, folder=folder)


@pytest.fixture(scope="module")
def loaded(published):
    """What a stranger's process found in each adapter."""
    code, out, err = load(published, *((name, {}) for name in ADAPTERS))
    assert code == 0, err[-3000:]
    return dict(zip(ADAPTERS, json.loads(out.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_stranger_loads_it_with_one_line(published, loaded, method):
    hub, _, _, facts = published
    result = loaded[method]
    prefix = "Dora" if method == "dora" else "MixLora"
    assert result["equal"], "logits after save -> push -> load are not bit-equal"
    assert result["module"].startswith("transformers_modules.")
    assert result["classes"] == [f"{prefix}ForCausalLM", f"{prefix}Model", "LlamaForCausalLM"]
    assert result["pipeline"]
    assert result["ours"] == []
    assert result["revision"] == facts[method]["revision"] == hub.repo("org/base").commit("main").oid


def test_what_was_pushed(published):
    hub, _, _, facts = published
    for method in METHODS:
        repo = hub.repo(f"author/{method}")
        assert repo.private
        names = set(repo.files("main"))
        assert {"config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
        assert "generation_config.json" in names
        assert not {"adapter_config.json", "model.safetensors"} & names
        assert facts[method]["fingerprint"].startswith("sha256:")


def test_without_trust_nothing_of_the_repo_is_run(published):
    script = STRANGER + "AutoModelForCausalLM.from_pretrained('author/dora', trust_remote_code=False)"
    hub, token, folder, _ = published
    environment = hub.environment(token=token, cache_dir=folder / "wary")
    code, _, err = run(script, environment=environment, folder=folder)
    assert code == 1
    assert "trust_remote_code=True" in err
    assert not list((folder / "wary").rglob("modeling_minilora.py"))


def test_a_private_adapter_is_not_found_without_a_token(published):
    code, _, err = load(published, ("dora", {}), token=False, folder_name="anonymous")
    assert code == 1
    assert "author/dora" in err


def test_registered_classes_win_over_the_code_in_the_repo(published):
    hub, token, folder, _ = published
    script = """
        import sys, minilora_hub
        from transformers import AutoModelForCausalLM
        assert minilora_hub.MixLoraForCausalLM and "peft" not in sys.modules  # whose import takes seconds
        minilora_hub.register()
        model = AutoModelForCausalLM.from_pretrained("author/mixlora")
        assert type(model) is minilora_hub.MixLoraForCausalLM
        assert not [name for name in sys.modules if name.startswith("transformers_modules")]
    """
    environment = hub.environment(token=token, cache_dir=folder / "registered")
    code, _, err = run(script, environment=environment, folder=folder)
    assert code == 0, err[-3000:]


def test_base_and_adapter_revisions_are_pinned_apart(published, tmp_path):
    """The base moves on, and the adapter gets a second version: both first versions still load together."""
    hub, _, _, facts = published
    first = hub.repo("author/dora").commit("main").oid
    other = tmp_path / "other"
    tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None, seed=4).save_pretrained(other)
    hub.repo("org/base").push({"model.safetensors": (other / "model.safetensors").read_bytes()}, "retrained", "main")
    assert hub.repo("org/base").commit("main").oid != facts["dora"]["revision"]

    # Asked for by name, the moved base is loaded, with a warning that it is another one.
    moved = "AutoModelForCausalLM.from_pretrained('author/dora', trust_remote_code=True, base_revision='main')"
    code, out, err = load(published, ("dora", {"revision": first}), more=moved, folder_name="pinned")
    assert json.loads(out.splitlines()[-1])[0]["equal"], err[-3000:]
    assert code == 1
    assert "UserWarning: this adapter was trained on a base with fingerprint" in err


def test_the_page_takes_adapters_by_their_id(published, tmp_path):
    """They are fetched and loaded with our own classes: the code in their repos is not run."""
    hub, token, folder, _ = published
    script = """
        import sys
        from minilora_hub import CompareEngine
        engine = CompareEngine("org/base", ["author/dora", "author/mixlora"])
        assert [(c.name, c.kind) for c in engine.columns][1:] == [("dora", "DoRA"), ("mixlora", "MixLoRA")]
        assert not [name for name in sys.modules if name.startswith("transformers_modules")]
        try:
            CompareEngine("org/base", ["author/nothing"])
        except Exception as error:
            assert "no such folder, and on the Hub: " in str(error), error
            print(type(error).__name__)
    """
    environment = hub.environment(token=token, cache_dir=folder / "page")
    code, out, err = run(script, environment=environment, folder=tmp_path)
    assert code == 0, err[-3000:]
    assert out.strip() == "AdapterError"
