"""The adapter bank against each adapter alone: rows of every kind in one batch, and the pool that holds them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.banked_layers import LinearUpdate
from minilora_hub.errors import AdapterError

PEFT_SETTINGS = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"self_attn.q_proj": 3},
    },
    "one-layer": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "peft-dora": {"r": 4, "use_dora": True, "target_modules": ["k_proj", "gate_proj"]},
}


def random_peft(family: str, name: str):
    """One of PEFT's own adapters on a tiny base, every tensor random."""
    settings = {"lora_alpha": 8, "task_type": "CAUSAL_LM", **PEFT_SETTINGS[name]}
    model = get_peft_model(tiny.tiny_base(family), LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.mul_(1 + noise) if "magnitude" in key else parameter.copy_(noise)
    return model


def make_models(family: str = "llama") -> dict[str, torch.nn.Module]:
    """Adapters of every kind, alone on a base of their own."""
    small = {"target_modules": ["down_proj", "o_proj"]} if family == "llama" else {}
    models = {
        "dora": tiny.tiny_model(family, "dora"),
        "dora-small": tiny.tiny_model(family, "dora", r=2, **small),
        "mix": tiny.tiny_model(family, "mixlora"),
        "mix-3": tiny.tiny_model(family, "mixlora", r=3, num_experts=5, num_experts_per_tok=3),
        "mixdora": tiny.tiny_model(family, "mixdora"),
        "mix-top-p": tiny.tiny_model(family, "mixlora", routing_strategy="top_p", router_top_p=0.6),
        "mix-switch": tiny.tiny_model(
            family, "mixlora", routing_strategy="switch", expert_capacity=2, router_sparse_step=2
        ),
    }
    if family == "llama":
        models |= {name: random_peft(family, name) for name in PEFT_SETTINGS}
    return {None: tiny.tiny_base(family), **{name: model.eval() for name, model in models.items()}}


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    for name, model in models.items():
        if name is not None:
            model.save_pretrained(root / name)
    return {name: root / name for name in models if name is not None}


@pytest.fixture
def bank(folders):
    bank = AdapterBank(tiny.tiny_base())
    for name, folder in folders.items():
        bank.load(name, folder)
    return bank


@torch.no_grad()
def run(bank: AdapterBank, names, ids, **arguments):
    """Logits of one forward, with a row a name."""
    with bank.use(names), bank.rows(names):
        return bank.model(ids, **arguments).logits


def different_prompts(count: int, length: int = 9) -> torch.Tensor:
    return torch.stack([tiny.token_ids(1, length, seed=row)[0] for row in range(count)])


# ---- exactness ----


def test_every_kind_in_one_batch_equals_each_alone(bank, models):
    """Elementwise, rows of each adapter next to each other and the bare base between them."""
    names = [None, *list(models)[1:], None, "mix", "mix", None, "lora", "lora", "lora"]
    ids = different_prompts(len(names))
    together = run(bank, names, ids)
    for row, name in enumerate(names):
        expected = tiny.logits(models[name], ids[row : row + 1])[0]
        assert (together[row] - expected).abs().max() < 1e-4, name
    distinct = {tuple(together[row, -1].tolist()) for row in range(len(models))}
    assert len(distinct) == len(models)


@pytest.mark.parametrize("family", [*tiny.FAMILIES[1:], *tiny.OTHER_FAMILIES])
def test_families(family, tmp_path):
    """Fused and ungated blocks, biases, Conv1D: all that the island adapts, the bank serves."""
    models = make_models(family)
    bank = AdapterBank(tiny.tiny_base(family))
    for name, model in models.items():
        if name is not None:
            model.save_pretrained(tmp_path / name)
            bank.load(name, tmp_path / name)
    ids = different_prompts(len(models))
    together = run(bank, list(models), ids)
    for row, name in enumerate(models):
        assert (together[row] - tiny.logits(models[name], ids[row : row + 1])[0]).abs().max() < 1e-4, name


def test_biases(tmp_path):
    """DoRA leaves the base's bias out of its scale, in a bank as alone."""
    base, bank = tiny.tiny_base(biases=True), AdapterBank(tiny.tiny_base(biases=True))
    for method in tiny.METHODS:
        model = tiny.CAUSAL_LM[method].from_base(tiny.tiny_base(biases=True), tiny.tiny_config(method))
        tiny.fill_adapter(model)
        model.save_pretrained(tmp_path / method)
        bank.load(method, tmp_path / method)
        ids = different_prompts(3)
        together = run(bank, [None, method, method], ids)
        assert (together[1:] - tiny.logits(model.eval(), ids[1:])).abs().max() < 1e-4
        assert (together[:1] - tiny.logits(base, ids[:1])).abs().max() < 1e-4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_decoding_with_a_cache(bank, models, count):
    """One token a row and step: few rows take another way through the matrix library."""
    names = (["mix-3", "mixdora", "lora", None, "dora", "mix-top-p", "rslora", "mix", "patterns"])[:count]
    ids = different_prompts(count, 6)
    with torch.no_grad(), bank.use(names), bank.rows(names):
        cache = bank.model(ids[:, :3], use_cache=True).past_key_values
        steps = [bank.model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(3, 6)]
    for row, name in enumerate(names):
        expected = tiny.logits(models[name], ids[row : row + 1])[0, 3:]
        assert (torch.cat(steps, dim=1)[row] - expected).abs().max() < 1e-4, name


def test_padded_rows(bank, models):
    """Prompts of different lengths, padded on the left: padding reaches nobody."""
    names, lengths = ["mix", "lora", None, "mixdora"], [3, 7, 5, 6]
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 7 - length :], mask[row, 7 - length :] = tiny.token_ids(1, length, seed=row)[0], 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    together = run(bank, names, ids, attention_mask=mask, position_ids=positions)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        expected = tiny.logits(models[name], ids[row : row + 1, 7 - length :])[0]
        assert (together[row, 7 - length :] - expected).abs().max() < 1e-4


def test_a_row_does_not_depend_on_its_neighbours(bank):
    """The same row among others, at another place, of other adapters."""
    ids = different_prompts(4)
    first = run(bank, ["mix", "lora", None, "dora"], ids)
    again = run(bank, [None, "mixdora", "mix", "mix"], ids[[2, 1, 0, 3]])
    assert (first[0] - again[2]).abs().max() < 1e-4
    assert (first[2] - again[0]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(models, folders, dtype):
    """As the adapter alone on a base of that dtype, beyond rounding."""
    bank = AdapterBank(tiny.tiny_base().to(dtype))
    names = ["mix", "dora", "lora", None]
    for name in names[:-1]:
        bank.load(name, folders[name])
    ids = different_prompts(4)
    together = run(bank, names, ids).float()
    for row, name in enumerate(names):
        exact = tiny.logits(models[name], ids[row : row + 1])[0]
        assert (together[row] - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_quantised_base(folders, tmp_path):
    """NF4: the base's layers are called, never unpacked, and once for all rows."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

    tiny.tiny_base(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")

    bank, alone = AdapterBank(base()), {}
    for method in ("dora", "mixlora"):
        plain = tiny.tiny_base(hidden_size=64, intermediate_size=64)
        model = tiny.CAUSAL_LM[method].from_base(plain, tiny.tiny_config(method))
        tiny.fill_adapter(model)
        model.save_pretrained(tmp_path / method)
        kind = {"dora": DoraForCausalLM, "mixlora": MixLoraForCausalLM}[method]
        alone[method] = kind.from_pretrained(tmp_path / method, base_model=base(), dtype=torch.float32).eval()
        bank.load(method, tmp_path / method)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in bank.model.modules())
    ids = different_prompts(2)
    together = run(bank, list(alone), ids)
    for row, model in enumerate(alone.values()):
        assert (together[row] - tiny.logits(model, ids[row : row + 1])[0]).abs().max() < 1e-4


class CountProducts(TorchFunctionMode):
    """How often each of these weights is multiplied by something."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights, self.counts = weights, Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.nn.functional.linear, torch.mm, torch.Tensor.mm, torch.matmul, torch.addmm, torch.bmm):
            for argument in args:
                if isinstance(argument, torch.Tensor) and argument.data_ptr() in self.weights:
                    self.counts[self.weights[argument.data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [1, 7])
def test_every_base_layer_runs_exactly_once(bank, models, length):
    """Whatever adapters the rows have, in one step of one token a row and of several."""
    weights = {
        module.weight.data_ptr(): path
        for path, module in bank.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    names = list(models)
    with CountProducts(weights) as products:
        run(bank, names, different_prompts(len(names), length))
    assert len(weights) == 2 * 7 + 1
    assert products.counts == dict.fromkeys(weights.values(), 1)


# ---- the pool ----


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
    assert (entry.facts.kind, entry.facts.detail) == ("MixLoRA", "r 4, 4 experts, 2 active")
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


# ---- what is refused ----


def test_names(bank):
    with pytest.raises(ValueError, match="name='mix': an adapter of this name is registered"):
        bank.register("mix", "anywhere")
    with pytest.raises(AdapterError, match="'nobody': not registered"), bank.use(["nobody"]):
        pass
    with pytest.raises(ValueError, match=r"names=\['nobody'\]: not in memory"), bank.rows(["nobody"]):
        pass
    with pytest.raises(AdapterError, match="'nobody': not registered"):
        bank.unload("nobody")
    with pytest.raises(ValueError, match="limit=0"):
        AdapterBank(tiny.tiny_base(), limit=0)


def test_a_damaged_adapter_leaves_the_bank_as_it_was(bank, folders, models, tmp_path):
    """Missing, surplus, misshapen, not finite: named, nothing loaded, the others unharmed."""

    def without_one(tensors):
        tensors.popitem()

    def misshapen(tensors):
        name = next(iter(tensors))
        tensors[name] = tensors[name][..., :-1].contiguous()

    def not_finite(tensors):
        next(iter(tensors.values())).view(-1)[0] = float("inf")

    def surplus(tensors):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(1)

    before = [entry.name for entry in bank.list()]
    for source in ("lora", "mix", "dora"):
        for index, spoil in enumerate((without_one, misshapen, not_finite, surplus)):
            folder = tmp_path / f"{source}-{index}"
            shutil.copytree(folders[source], folder)
            tensors = load_file(folder / "adapter_model.safetensors")
            spoil(tensors)
            save_file(tensors, folder / "adapter_model.safetensors")
            named = r"missing|has shape|not finite|surplus|lora_C"
            with pytest.raises((ValueError, AdapterError), match=named):
                bank.load("damaged", folder)
    assert [entry.name for entry in bank.list()] == before
    ids = different_prompts(1)
    assert (run(bank, ["mix"], ids) - tiny.logits(models["mix"], ids)).abs().max() < 1e-4


def test_an_adapter_of_another_base_is_refused(folders):
    """By the tensor that does not fit."""
    bank = AdapterBank(tiny.tiny_base(hidden_size=48))
    for name in ("lora", "mix", "dora"):
        with pytest.raises((ValueError, AdapterError), match="has shape"):
            bank.load(name, folders[name])
    assert bank.list() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("peft_type", "IA3"),
    ],
)
def test_peft_settings_that_are_no_plain_lora_are_refused(folders, tmp_path, field, value):
    """By their name, before a tensor is read."""
    shutil.copytree(folders["lora"], tmp_path / "adapter")
    path = Path(tmp_path / "adapter" / "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(AdapterError, match=f"{field}="):
        AdapterBank(tiny.tiny_base()).load("adapter", tmp_path / "adapter")


# ---- what others hold, and what fails halfway ----


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


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": None},
        {"lora_alpha": "8"},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": "q"},
        {"r": None, "rank_pattern": {".*": 4}},
        "r",
        "lora_alpha",
    ],
    ids=str,
)
def test_peft_settings_that_are_no_numbers_are_named(folders, tmp_path, changes):
    """One line with the field, and not whatever the arithmetic says."""
    shutil.copytree(folders["lora"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    if isinstance(changes, str):
        field = changes
        del settings[changes]
    else:
        field = list(changes)[-1] if "r" not in changes else "r"
        settings |= changes
    path.write_text(json.dumps(settings))
    with pytest.raises((AdapterError, ValueError), match=rf"\b{field}\b.*(must be|is missing)|Infinity"):
        AdapterBank(tiny.tiny_base()).load("adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [{"rank_pattern": [1]}, {"rank_pattern": {"(": 3}}, {"alpha_pattern": {"(": 3.0}}, {"lora_alpha": float("inf")}],
    ids=str,
)
def test_settings_of_ours_that_make_no_sense_are_named(folders, tmp_path, changes):
    """As for PEFT's."""
    shutil.copytree(folders["dora"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((AdapterError, ValueError), match=rf"\b{next(iter(changes))}\b.*must be"):
        AdapterBank(tiny.tiny_base()).load("adapter", tmp_path / "adapter")


def test_an_adapter_that_changes_on_disk_between_two_readings(folders, models, tmp_path):
    """What is read again is what is there: of another kind, or damaged, which only its own rows feel."""
    shutil.copytree(folders["lora"], tmp_path / "adapter")
    bank = AdapterBank(tiny.tiny_base(), limit=1)
    bank.load("changing", tmp_path / "adapter")
    bank.load("dora", folders["dora"])  # the pool holds one
    shutil.rmtree(tmp_path / "adapter")
    shutil.copytree(folders["mix"], tmp_path / "adapter")
    ids = different_prompts(3)
    names = [None, "dora", "changing"]
    together = run(bank, names, ids)
    for row, name in enumerate([None, "dora", "mix"]):
        assert (together[row] - tiny.logits(models[name], ids[row : row + 1])[0]).abs().max() < 1e-4
    assert next(entry for entry in bank.list() if entry.name == "changing").facts.kind == "MixLoRA"


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
