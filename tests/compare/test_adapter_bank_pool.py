"""The pool: what is loaded, kept, put away, and what others hold of it."""

from __future__ import annotations

import pytest
import tiny
import torch
from compare.bank_models import different_prompts, run

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.banked_layers import LinearUpdate


def test_the_base_that_was_handed_in_is_left_as_it_is(folders):
    """No wrapper, no hook, no mode, no frozen parameter."""
    base = tiny.tiny_base().train()
    before = {path: type(module) for path, module in base.named_modules()}
    bank = AdapterBank(base)
    for name, folder in folders.items():
        bank.load(name, folder)
    assert {path: type(module) for path, module in base.named_modules()} == before
    assert base.training
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert bank.memory().base == sum(t.numel() * t.element_size() for t in (*base.parameters(), *base.buffers()))


def test_load_unload_list_and_memory(folders, models):
    """Bytes are those of the adapter's tensors, and all of them come back."""
    bank = AdapterBank(tiny.tiny_base())
    assert bank.list() == []
    entry = bank.load("mix", folders["mix"])
    assert entry.loaded
    assert entry.bytes == 4 * models["mix"].num_adapter_parameters() == bank.memory().adapters
    assert (entry.facts.kind, entry.facts.detail) == ("MixLoRA", "rank 4, 4 experts, 2 active")
    assert entry.facts.parameters == models["mix"].num_adapter_parameters()
    registered = bank.register("lora", folders["lora"])
    assert not registered.loaded
    assert [entry.name for entry in bank.list()] == ["mix", "lora"]
    bank.unload("mix")
    bank.unload("lora")
    assert bank.list() == []
    assert bank.memory().adapters == 0
    ids = different_prompts(1)
    assert torch.equal(run(bank, [None], ids), tiny.logits(models[None], ids))


def test_swap_an_adapter_without_reloading_the_base(folders, models):
    """One name, another adapter: no tensor of the base moves."""
    bank = AdapterBank(tiny.tiny_base())
    pointers = [parameter.data_ptr() for parameter in bank.model.parameters()]
    ids = different_prompts(1)
    for name in ("lora", "mix", "dora"):
        bank.load("current", folders[name])
        assert (run(bank, ["current"], ids) - tiny.logits(models[name], ids)).abs().max() < 1e-4
        bank.unload("current")
    assert [parameter.data_ptr() for parameter in bank.model.parameters()] == pointers


def test_the_pool_keeps_the_most_recently_used(folders):
    """Bounded in bytes; what falls out is read again when a row asks for it."""
    kinds = ["lora", "dora", "mixdora", "mix", "rslora", "mix-3"]
    room = AdapterBank(tiny.tiny_base())
    sizes = {name: room.load(name, folders[name]).bytes for name in kinds}
    bank = AdapterBank(tiny.tiny_base(), limit=sizes["mix"] + sizes["lora"])
    for name in kinds:
        bank.register(name, folders[name])
    ids = different_prompts(1)
    for name in [*kinds, "lora", "mix", *reversed(kinds)]:
        expected = run(room, [name], ids)
        assert torch.equal(run(bank, [name], ids), expected)
        memory = bank.memory()
        loaded = [entry.name for entry in bank.list() if entry.loaded]
        assert name in loaded
        assert memory.adapters == sum(sizes[name] for name in loaded)
        assert memory.adapters <= bank.memory().limit or loaded == [name]
    run(bank, ["mix"], ids)
    run(bank, ["lora"], ids)
    assert {entry.name for entry in bank.list() if entry.loaded} == {"mix", "lora"}


def test_adapters_in_use_stay(folders):
    """A batch may need more than the pool's bound: it gets it, and the bound holds again afterwards."""
    bank = AdapterBank(tiny.tiny_base(), limit=1)
    for name in ("lora", "dora", "mix"):
        bank.register(name, folders[name])
    with bank.use(["lora", "mix"]):
        assert {entry.name for entry in bank.list() if entry.loaded} == {"lora", "mix"}
        with pytest.raises(ValueError, match="name='mix': rows are using"):
            bank.unload("mix")
    with bank.use(["dora"]):
        assert [entry.name for entry in bank.list() if entry.loaded] == ["dora"]


def test_what_falls_out_leaves_nothing_behind(folders):
    """No layer still holds its tensors."""
    bank = AdapterBank(tiny.tiny_base())
    for name, folder in folders.items():
        bank.load(name, folder)
        bank.unload(name)
    for module in bank.model.modules():
        assert not getattr(module, "updates", None)
        assert not getattr(module, "mixtures", None)


class HalvedLinear(torch.nn.Linear):
    """A linear whose weight does not tell what it computes."""

    def forward(self, x):
        return 0.5 * super().forward(x)


def halve_by_class(layer):
    layer.__class__ = HalvedLinear


def halve_by_hook(layer):
    layer.register_forward_pre_hook(lambda module, arguments: (0.5 * arguments[0],))


@pytest.mark.parametrize("change", [halve_by_class, halve_by_hook])
def test_a_base_layer_with_a_forward_of_its_own_is_called(change, folders):
    """Few rows or many: never computed from its weight alone."""
    base = tiny.tiny_base()
    change(base.model.layers[0].mlp.up_proj)
    for count in (1, 3):
        ids = different_prompts(count, 1)
        assert (run(AdapterBank(base), [None] * count, ids) - tiny.logits(base, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["lora", "dora", "mix", "mixdora"])
@pytest.mark.parametrize("layer", ["up_proj", "down_proj"])
def test_what_a_hook_keeps_is_not_written_to(folders, name, layer):
    """A hook on a layer of the base keeps that layer's output, which an adapter's update must not change."""
    base, kept = tiny.tiny_base(), []
    hooked = getattr(base.model.layers[0].mlp, layer)
    hooked.register_forward_hook(lambda module, arguments, output: kept.append((output, output.clone())))
    bank = AdapterBank(base)
    bank.load(name, folders[name])
    kept.clear()
    run(bank, [None, name, name], different_prompts(3))
    assert len(kept) == 1
    assert torch.equal(*kept[0])


def test_a_load_that_fails_halfway_leaves_no_layer_with_a_part(folders, models, monkeypatch):
    """Out of memory at the fourth layer: another adapter of that name has none of it."""
    bank, of, calls = AdapterBank(tiny.tiny_base()), LinearUpdate.of, []

    def out_of_memory_at_the_fourth(module):
        calls.append(module)
        if len(calls) == 4:
            raise MemoryError("no room")
        return of(module)

    with monkeypatch.context() as patch:
        patch.setattr(LinearUpdate, "of", out_of_memory_at_the_fourth)
        with pytest.raises(MemoryError):
            bank.load("a", folders["dora"])
    assert bank.list() == []
    bank.load("a", folders["one-layer"])
    ids = different_prompts(1)
    assert (run(bank, ["a"], ids) - tiny.logits(models["one-layer"], ids)).abs().max() < 1e-5


def test_loaded_in_inference_mode_used_with_gradients(folders, models):
    """What is kept in memory outlives the mode it was read in."""
    bank = AdapterBank(tiny.tiny_base())
    with torch.inference_mode():
        bank.load("mixdora", folders["mixdora"])
    ids = different_prompts(2)
    with torch.enable_grad(), bank.use(["mixdora"]), bank.rows([None, "mixdora"]):
        logits = bank.model(ids).logits
    logits.sum().backward()
    assert (logits[1] - tiny.logits(models["mixdora"], ids[1:])[0]).abs().max() < 1e-4


def test_the_memory_report_while_another_thread_loads(folders):
    """A page reports memory whenever somebody opens it; the other thread's turn comes in the middle of it."""
    bank = AdapterBank(tiny.tiny_base())

    class LoadsMeanwhile:
        @property
        def bytes(self):
            bank.load("coming", folders["one-layer"])
            return 0

    bank._entries["first"] = LoadsMeanwhile()
    assert bank.memory().adapters == 0
    assert bank.list()[-1].name == "coming"


def test_many_holders_of_one_adapter(folders):
    """It goes when the last one lets go, in whatever order they do."""
    bank = AdapterBank(tiny.tiny_base())
    bank.load("lora", folders["lora"])
    first, second = bank.use(["lora", None, "lora"]), bank.use(["lora"])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="rows are using"):
        bank.unload("lora")
    second.__exit__(None, None, None)
    bank.unload("lora")
