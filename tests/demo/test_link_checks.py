"""What a link to an adapter costs before it is known that it can be shown: the small files, and never the weights."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from hub.server import HubServer
from tiny_stand_ins import save_base_and_adapters

from minilora_hub.bases import resolve_base
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.adapters.link_checks import most_bytes
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and an adapter of each kind, by name, as files: the adapters name org/base."""
    folder = tmp_path_factory.mktemp("models")
    base, adapters = save_base_and_adapters(folder)
    found = {}
    for adapter in adapters:
        files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
        for name in {"config.json", "adapter_config.json"} & files.keys():
            named = json.loads(files[name]) | {"base_model_name_or_path": "org/base", "base_fingerprint": "unknown"}
            if name == "adapter_config.json":
                del named["base_fingerprint"]
            files[name] = json.dumps(named).encode()
        found[adapter.name] = files
    return base, found


@pytest.fixture(scope="module")
def engine(models):
    return CompareEngine(models[0], device="cpu")


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    with HubServer(lfs_threshold=10_000) as server:
        server.use_in_process(monkeypatch, tmp_path / "hf")
        server.add_repo("org/base", files={path.name: path.read_bytes() for path in models[0].iterdir()})
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def links(hub, engine):
    return LinkedAdapters(engine, resolve_base("org/base", progress=False), PageLimits(link_megabytes=3))


def fetched(hub):
    return [one.path.rpartition("/")[2] for one in hub.requests if "/resolve/" in one.path and "ana/" in one.path]


def with_changes(files, **fields):
    name = "adapter_config.json" if "adapter_config.json" in files else "config.json"
    return files | {name: json.dumps(json.loads(files[name]) | fields).encode()}


@pytest.mark.parametrize("name", ["mix", "dora", "lora"])
def test_what_fits_is_fetched_at_last(hub, links, models, engine, tmp_path, name):
    """The weights are the last file that is asked for; loaded and answering as before."""
    hub.add_repo("ana/adapter", files=models[1][name])
    repo = links.fetch("ana/adapter", tmp_path)
    assert fetched(hub)[-1] == WEIGHTS
    column = links.load("ana/adapter", tmp_path, repo)
    assert column.parameters_added > 0
    engine.unload("ana/adapter")


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("dora", {"base_model_name_or_path": "org/other"}, "is for 'org/other', but this page runs 'org/base'"),
        ("dora", {"base_fingerprint": "sha256:" + "0" * 64}, "was trained on other weights of org/base"),
        (
            "dora",
            {"model_type": "llama"},
            "'configuration_minilora.DoraConfig', and the page runs no code of an adapter",
        ),
        ("dora", {"model_type": "llama", "auto_map": None}, "is a whole model (DoraForCausalLM), not an adapter"),
        ("mix", {"routing_strategy": "unheard_of"}, "config.json does not load"),
        ("mix", {"num_experts": 10**9, "num_experts_per_tok": 0}, "config.json does not load: num_experts_per_tok=0"),
        ("dora", {"target_modules": ["nothing"]}, "the base of this page has no such linear"),
        ("lora", {"target_modules": ["nothing"]}, "the base of this page has no such linear"),
        ("dora", {"target_parameters": ["mlp.experts.down_proj"]}, "a page does not load adapters on stacked experts"),
        ("lora", {"target_parameters": ["mlp.experts.down_proj"]}, "a page does not load adapters on stacked experts"),
        ("lora", {"r": 0}, "r='0': must be a whole number above 0"),
        ("lora", {"r": "4"}, "r='4': must be a whole number above 0"),
        ("lora", {"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ("lora", {"base_model_name_or_path": "org/other"}, "is for 'org/other'"),
        ("lora", {"init_lora_weights": "pissa"}, "changes the base's own weights"),
    ],
)
def test_what_cannot_be_shown_is_refused_without_its_weights(hub, links, models, tmp_path, name, fields, told):
    hub.add_repo("ana/adapter", files=with_changes(models[1][name], **fields))
    with pytest.raises(AdapterError) as refused:
        links.fetch("ana/adapter", tmp_path)
    assert told in str(refused.value)
    assert WEIGHTS not in fetched(hub)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("name", ["mix", "dora", "lora"])
def test_weights_larger_than_the_configuration_makes_them(hub, links, models, tmp_path, name):
    """By the Hub's list of files; below the page's own limit."""
    hub.add_repo("ana/adapter", files=models[1][name] | {WEIGHTS: bytes(2_900_000)})
    with pytest.raises(AdapterError, match=r"is 2\.9 MB; its configuration implies at most [12]\.\d* MB"):
        links.fetch("ana/adapter", tmp_path)
    assert WEIGHTS not in fetched(hub)


def test_nothing_at_all_is_fetched_of_what_the_list_of_files_shows(hub, links, models, tmp_path):
    files = models[1]["dora"]
    cases = {
        "no-adapter": ({"config.json": files["config.json"]}, "has no adapter_model.safetensors"),
        "large": (files | {WEIGHTS: bytes(3_100_000)}, "from a link this page downloads at most 3 MB"),
        "outside": (files | {"a/../../x.json": b"{}"}, "which is not a path inside a repo"),
        "config": (
            files | {"tokenizer_config.json": bytes(2**20 + 1)},
            "from a link this page downloads at most 1.04858 MB",
        ),
    }
    for name, (content, told) in cases.items():
        hub.add_repo(f"ana/{name}", files=content)
        with pytest.raises(AdapterError) as refused:
            links.fetch(f"ana/{name}", tmp_path)
        assert told in str(refused.value)
    assert fetched(hub) == []


def test_the_bound_holds_for_real_adapters(models, engine):
    """Every kind, whose file may also be of the widest dtype; a hundredfold configuration is a hundredfold file."""
    for name, files in models[1].items():
        config = json.loads(files["adapter_config.json" if name == "lora" else "config.json"])
        bound = most_bytes(config, engine.bank.linears)
        assert 2 * len(files[WEIGHTS]) < bound
        assert most_bytes(config | {"r": 100 * config["r"]}, engine.bank.linears) > 20 * (bound - 2**20)


def test_folders_that_visitors_choose_from_are_looked_at(links, models, engine, tmp_path):
    """A link out of the folder, and weights that lie about their size: told on the card, and not loaded."""
    folder = tmp_path / "allowed" / "mine"
    folder.mkdir(parents=True)
    for name, content in models[1]["dora"].items():
        (folder / name).write_bytes(content)
    (tmp_path / "secret.json").write_text('{"schema_version": 2}')
    (folder / "results.json").symlink_to(tmp_path / "secret.json")
    catalogue = Catalogue(engine, links, [tmp_path / "allowed"])
    for look in (lambda: catalogue.card("mine"), lambda: links.load("mine", folder)):
        with pytest.raises(AdapterError, match=r"results\.json is a symbolic link out of the folder"):
            look()
    (folder / "results.json").unlink()
    with (folder / WEIGHTS).open("ab") as file:
        file.write(bytes(1000))
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        links.load("mine", folder)
