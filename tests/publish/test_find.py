"""Looking at adapters, listing them, fetching them."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from huggingface_hub.hf_api import ModelSort_T
from tiny_stand_ins import tiny_llama

from minilora_hub import push
from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.publish.find import info, pull
from minilora_hub.publish.listing import SORTS, list_adapters

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.mark.parametrize(("method", "layout"), [("dora", "auto"), ("mixlora", "auto"), ("lora", "peft")])
def test_info_of_a_folder(good, method, layout):
    found = info(good[method])
    assert (found.method.lower(), found.layout, found.base) == (method, layout, "org/base")
    assert found.settings["r"] == 4
    assert found.settings.get("num_experts") == (4 if method == "mixlora" else None)
    assert found.code == ("this version" if layout == "auto" else None)
    assert found.bytes == sum(path.stat().st_size for path in good[method].rglob("*") if path.is_file())
    assert (found.steps, found.license, found.evaluation[0].value) == (200, "apache-2.0", 0.9)


@pytest.mark.parametrize(
    ("strategy", "shown"),
    [
        ({"routing_strategy": "top_p"}, {"routing_strategy": "top_p", "router_top_p": 0.8}),
        (
            {"routing_strategy": "switch", "expert_capacity": 5, "router_sparse_step": 2},
            {"routing_strategy": "switch", "num_experts_per_tok": 1, "expert_capacity": 5, "router_sparse_step": 2},
        ),
    ],
)
def test_info_says_how_experts_are_chosen(strategy, shown, tmp_path):
    from minilora_hub import MixLoraConfig, MixLoraForCausalLM

    config = MixLoraConfig(r=4, num_experts=4, base_model_name_or_path="org/base", **strategy)
    MixLoraForCausalLM.from_base(tiny_llama(), config).save_pretrained(tmp_path)
    settings = info(tmp_path).settings
    routing = settings.keys() & {"num_experts_per_tok", "routing_strategy", "router_top_p", "router_temperature"}
    assert {name: settings[name] for name in routing | settings.keys() & shown.keys()} == shown


def test_info_counts_what_a_model_counts(good, base_folder):
    from minilora_hub import MixLoraForCausalLM

    model = MixLoraForCausalLM.from_pretrained(str(good["mixlora"]), base_model=str(base_folder))
    assert info(good["mixlora"]).parameters == model.num_adapter_parameters()


def test_info_loads_no_torch(good):
    code = (
        "import sys; from minilora_hub.publish.find import info; info(sys.argv[1])\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(good["dora"])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def published(hub, trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    for method, folder in trained.items():
        push(folder, f"ana/{method}", private=method == "mixlora", verify=False, progress=False)
    hub.repo("ana/lora").downloads = 7
    hub.repo("ana/dora").likes = 3
    hub.add_repo("ben/unrelated", files={"README.md": b"---\ntags: [dora]\nbase_model: org/other\n---\n"})
    return hub


def test_listing(published, hub, monkeypatch):
    assert [row.id for row in list_adapters("org/base")][:1] == ["ana/lora"]
    assert {row.id for row in list_adapters("org/base")} == {"ana/lora", "ana/mixlora", "ana/dora"}
    assert list_adapters("org/base", sort="likes")[0].id == "ana/dora"
    (mix,) = list_adapters("org/base", method="mixlora")
    assert (mix.method, mix.bases, mix.private, mix.license) == ("MixLoRA", ("org/base",), True, "apache-2.0")
    assert {row.id for row in list_adapters()} == {"ana/dora", "ana/mixlora", "ben/unrelated"}
    hub.add_repo("ben/both", files={"README.md": b"---\ntags: [mixlora, mixdora]\nbase_model: org/other\n---\n"})
    assert [(row.id, row.method) for row in list_adapters(method="mixdora")] == [("ben/both", "MixDoRA")]
    assert {row.id for row in list_adapters(method="mixlora")} == {"ana/mixlora", "ben/both"}
    assert list_adapters("org/base", limit=1)[0].id == "ana/lora"
    assert list_adapters("embedded") == []
    monkeypatch.setenv("HF_TOKEN", "")
    assert "ana/mixlora" not in {row.id for row in list_adapters("org/base")}


@pytest.mark.parametrize("base", [None, "org/base"])
def test_every_order_is_the_hubs(hub, base):
    """Of two methods, which are two searches, and of one base: made in one order, changed in another."""
    card = "---\ntags: [{}]\nbase_model: org/base\nbase_model_relation: adapter\n---\n"
    for number, method in enumerate(["dora", "mixlora", "dora", "mixlora"]):
        repo = hub.add_repo(f"ana/{number}", files={"README.md": card.format(method).encode()})
        repo.downloads, repo.likes, repo.trending = (number * step % 5 for step in (2, 3, 4))
        repo.created_at = f"2025-01-0{1 + (number + 1) % 4}T10:00:00.000Z"
    for number in (2, 0, 3, 1):
        hub.repo(f"ana/{number}").push({"x": b""})
    expected = {
        "downloads": "2130",
        "likes": "3120",
        "trending_score": "1230",
        "created_at": "2103",
        "last_modified": "1302",
    }
    for sort, order in expected.items():
        found = list_adapters(base, sort=sort)
        assert [row.id for row in found] == [f"ana/{number}" for number in order], sort
        assert [row.id for row in list_adapters(base, sort=sort, limit=2)] == [row.id for row in found[:2]]
    assert found[0].created == "2025-01-03"
    assert set(SORTS) == set(get_args(ModelSort_T)) == expected.keys()


def test_a_hub_that_does_not_search_by_tag(published, monkeypatch):
    """Its other models are left out, and where they are too many, that is said."""
    right = {base: list_adapters(base) for base in (None, "org/base")}
    published.searches_tags = False
    published.repo("org/base").downloads = 99
    for base, found in right.items():
        assert list_adapters(base) == found
        assert list_adapters(base, limit=1) == found[:1]
    monkeypatch.setattr("minilora_hub.publish.listing.LOOKED_AT", 3)
    with pytest.raises(PublishError, match="does not search by tag, and has more than 3 models"):
        list_adapters("org/base")


def test_listing_what_cannot_be(published):
    with pytest.raises(ValueError, match="method='qlora'"):
        list_adapters(method="qlora")
    with pytest.raises(ValueError, match="sort='size'"):
        list_adapters(sort="size")
    published.faults.add(kind="status", status=503, times=None)
    with pytest.raises(PublishError, match="the Hub failed"):
        list_adapters("org/base")


def test_pull(published, tmp_path):
    files = published.repo("ana/dora").files("main")
    cached = pull("ana/dora", progress=False)
    assert cached.name == published.repo("ana/dora").commit("main").oid
    out = pull("ana/dora", out=tmp_path / "mine", progress=False)
    assert {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert not any(path.is_symlink() for path in out.rglob("*"))
    with pytest.raises(AdapterError, match="it exists already"):
        pull("ana/dora", out=tmp_path / "mine")
    with pytest.raises(AdapterError, match="ana/gone is not on the Hub"):
        pull("ana/gone", out=tmp_path / "gone", progress=False)
    assert not (tmp_path / "gone").exists()
    assert info("ana/dora", progress=False).revision == cached.name
