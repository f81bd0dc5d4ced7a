"""DoRA and MixLoRA adapters beside LoRAs and the base in one server of vLLM, loaded and unloaded while it runs.

The server has two slots and four adapters, so that every slot is reused, and rows of the base are computed while all
slots are in use (for which vLLM's own CPU kernels take the last adapter).
"""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/vllm makes an environment that has it")

import torch
from engines.vllm.answers_here import NEW_TOKENS, TEXTS, answers, base_folder, folder_of, prompts
from engines.vllm.vllm_processes import Server
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
ADAPTERS = {
    "lora": folder_of("lora"),
    "dora": folder_of("dora"),
    "dora-peft": folder_of("dora") / "peft",
    "mixlora": folder_of("mixlora"),
}
METHODS = {name: name.removesuffix("-peft") for name in ("base", *ADAPTERS)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    slots = ("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "8", "--max-lora-rank", "16")
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    modules = [f"{name}={folder}" for name, folder in ADAPTERS.items()]
    server = Server(base_folder(), log, "--served-model-name", "base", *slots, "--lora-modules", *modules[:2])
    for name, folder in list(ADAPTERS.items())[2:]:
        status, text = server.load(name, folder)
        assert status == 200, text
    yield server
    server.stop()


def asked(*names: str) -> list[tuple[str, list[int]]]:
    return [(name, ids) for ids in prompts() for name in names]


def expected(*names: str) -> list[list[int]]:
    return [answers(METHODS[name])[place] for place in range(len(prompts())) for name in names]


def test_the_adapters_differ():
    """Otherwise the tests below would pass with any of them."""
    found = [answers(method) for method in ("base", "lora", "dora", "mixlora")]
    assert all(one != other for place, one in enumerate(found) for other in found[:place])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_alone_and_with_base_rows(server, adapter):
    assert server.together(asked(adapter), NEW_TOKENS) == expected(adapter)
    assert server.together(asked(adapter, "base"), NEW_TOKENS) == expected(adapter, "base")


@pytest.mark.parametrize("pair", [("dora", "lora"), ("mixlora", "dora-peft"), ("lora", "mixlora")], ids="-".join)
def test_two_adapters_and_the_base_in_one_batch(server, pair):
    assert server.together(asked(*pair, "base"), NEW_TOKENS) == expected(*pair, "base")


def test_more_adapters_than_slots(server):
    """vLLM lets the rows of two adapters run, and the others wait for their slots."""
    assert server.together(asked(*METHODS), NEW_TOKENS) == expected(*METHODS)


def test_chat_with_adapters_that_come_and_go(server):
    for method in ("lora", "mixlora", "dora"):
        status, text = server.load("another", folder_of(method))
        assert status == 200, text
        assert server.chat("another", TEXTS[0], NEW_TOKENS) == (200, answers(method)[0])
        assert server.unload("another")[0] == 200
    assert "another" not in server.get("/v1/models")[1]
    assert server.chat("another", TEXTS[0], NEW_TOKENS)[0] == 404


def changed(folder, out, change):
    """A copy of an adapter with other tensors."""
    shutil.copytree(folder, out)
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


FIRST = "layers.0.self_attn.q_proj"
PEFT_FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED = {
    "no magnitude": ("dora", lambda t: t.pop(f"{FIRST}.magnitude"), f"missing {FIRST}.magnitude"),
    "short magnitude": (
        "dora",
        lambda t: t.update({f"{FIRST}.magnitude": t[f"{FIRST}.magnitude"][:-1].clone()}),
        f"{FIRST}.magnitude has shape (575,)",
    ),
    "not finite": ("dora", lambda t: t[f"{FIRST}.lora_A"].fill_(torch.nan), f"{FIRST}.lora_A holds values"),
    "surplus": ("dora", lambda t: t.update(more=torch.ones(2)), "surplus more"),
    "no magnitude in PEFT's file": (
        "dora/peft",
        lambda t: t.pop(f"{PEFT_FIRST}.lora_magnitude_vector.weight"),
        "model.layers.0.self_attn.q_proj: magnitude is missing",
    ),
    "no router": ("mixlora", lambda t: t.pop("layers.3.mlp.router"), "missing layers.3.mlp.router"),
    "too wide LoRA": (
        "lora",
        lambda t: t.update({f"{PEFT_FIRST}.lora_A.weight": torch.ones(12, 600)}),
        "model.layers.0.self_attn.q_proj.lora_A has shape (12, 600); the base and the rank need (12, 576)",
    ),
    "short LoRA": (
        "lora",
        lambda t: t.update({f"{PEFT_FIRST}.lora_B.weight": torch.ones(500, 12)}),
        "model.layers.0.self_attn.q_proj.lora_B has shape (500, 12); the base and the rank need (576, 12)",
    ),
    "half a LoRA": (
        "lora",
        lambda t: t.pop(f"{PEFT_FIRST}.lora_B.weight"),
        "missing model.layers.0.self_attn.q_proj.lora_B",
    ),
    "experts of another size": (
        "mixlora",
        lambda t: t.update({"layers.3.mlp.router": t["layers.3.mlp.router"][:2].clone()}),
        "layers.3.mlp.router has shape (2, 576)",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_wrong_file_is_refused_by_name_and_the_server_goes_on(server, tmp_path, case):
    method, change, message = DAMAGED[case]
    folder = changed(ADAPTERS.get(method.replace("/", "-")), tmp_path / "damaged", change)
    status, text = server.load("damaged", folder)
    assert status >= 400
    assert message in json.loads(text)["error"]["message"]
    assert server.together(asked("dora", "base"), NEW_TOKENS) == expected("dora", "base")


@pytest.mark.parametrize("method", ["lora", "dora", "mixlora"])
def test_half_a_file_is_refused_and_the_server_goes_on(server, tmp_path, method):
    folder = changed(ADAPTERS[method], tmp_path / "damaged", lambda tensors: None)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert server.load("damaged", folder)[0] >= 400
    assert server.tokens("dora", prompts()[0], NEW_TOKENS) == answers("dora")[0]


def test_what_cannot_be_served_beside_others_is_refused(server):
    status, text = server.load("mixdora", folder_of("mixdora"))
    assert status >= 400
    assert "use_dora=True in a MixLoRA" in text
