"""What one command refuses of an adapter, every command refuses: there is one strict reader for all of them."""

import json
import shutil

import pytest
import torch
from evaluation.small_tasks import small_tasks  # noqa: F401  a fixture
from formats.helpers import base_folder, edit_json, listing, peft_folder, peft_mixlora_folder
from safetensors.torch import load_file, save_file
from tiny import fill_adapter, logits, tiny_base, tiny_config
from tiny_stand_ins import byte_tokenizer
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.run import evaluate
from minilora_hub.formats.combine import Combination, combine
from minilora_hub.formats.experts import add_experts, drop_experts
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_adapter, import_as_experts
from minilora_hub.publish.find import info
from minilora_hub.publish.push.build import build

FILE = "adapter_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"
SIZE = {"vocab_size": 259, "bos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = base_folder(tmp_path_factory.mktemp("base"), **SIZE)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("good")
    found = {
        "lora": peft_folder(folder / "lora", tiny_base(**SIZE), target_modules="all-linear"),
        "peft dora": peft_folder(folder / "peft dora", tiny_base(**SIZE), target_modules="all-linear", use_dora=True),
    }
    for name, kind in (("dora", DoraForCausalLM), ("mixlora", MixLoraForCausalLM)):
        model = kind.from_base(str(base), tiny_config(name))
        fill_adapter(model)
        model.save_pretrained(folder / name)
        found[name] = folder / name
    return found


# ---- the ways in ----


def through_the_bank(source, out, base):
    AdapterBank(AutoModelForCausalLM.from_pretrained(base)).load("x", source)


def through_eval(source, out, base):
    evaluate([source], base=base, tasks=["echo"], count=1, few_shot=0, cache=False)


def through_push(source, out, base):
    build(source, out, repo_id="ana/x", base_id="org/base", license="mit", base_model=str(base))


def exporting(to):
    return lambda source, out, base: export_adapter(source, out, to, base=str(base))


EVERYWHERE = {"compare": through_the_bank, "eval": through_eval}
PEFT = {
    "import": lambda source, out, base: import_adapter(source, out, base=str(base)),
    "export dense": exporting("dense"),
    "push": through_push,
    **EVERYWHERE,
}
WAYS = {
    "lora": PEFT
    | {
        "combine": lambda source, out, base: combine(
            [source, source], out, Combination("cat", (0.5, 0.5)), base=str(base)
        ),
        "several": lambda source, out, base: import_as_experts([source, source], out, base=str(base)),
    },
    "peft dora": PEFT,
    "dora": {"export dense": exporting("dense"), "export peft": exporting("peft"), **EVERYWHERE},
    "mixlora": {
        "export mixtral": exporting("mixtral"),
        "export peft": exporting("peft"),
        "export mixlora": exporting("mixlora"),
        "experts add": lambda source, out, base: add_experts(source, out, [0], base=str(base)),
        "experts drop": lambda source, out, base: drop_experts(source, out, 1, base=str(base)),
        **EVERYWHERE,
    },
}


# ---- what is wrong ----


def tensors(edit):
    def damage(folder):
        found = load_file(folder / FILE)
        found = edit(found) or found
        save_file(found, folder / FILE)

    return damage


def settings(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def renamed(old, new):
    return tensors(lambda found: {name.replace(old, new): tensor for name, tensor in found.items()})


def first(found):
    return next(name for name in sorted(found) if "lora_A" in name)


def surplus_layer(found):
    """A third layer beside the base's two."""
    found.update(
        {name.replace("layers.1.", "layers.2."): t.clone() for name, t in found.items() if "layers.1." in name}
    )


def without_a_layer(folder):
    """ "all-linear" with nothing for the second layer."""
    edit_json(folder / "adapter_config.json", target_modules="all-linear")
    tensors(lambda found: {name: tensor for name, tensor in found.items() if "layers.1." not in name})(folder)


def no_value(found):
    found[first(found)][0, 0] = float("nan")


def twice(folder):
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")
    path.write_text('{"r": 1, ' + path.read_text().strip()[1:])


ANY = {
    "surplus layer": (tensors(surplus_layer), r"layers\.2\."),
    "missing tensor": (tensors(lambda found: {n: t for n, t in found.items() if n != first(found)}), r"missing"),
    "no number": (tensors(no_value), "not finite"),
    "whole numbers": (tensors(lambda found: {n: t.to(torch.int32) for n, t in found.items()}), "dtype torch.int32"),
    "misshapen": (tensors(lambda found: {n: t[..., :-1].contiguous() for n, t in found.items()}), "has shape"),
    "a field twice": (twice, "'r' occurs twice"),
    "Git LFS pointer": (lambda folder: (folder / FILE).write_text(POINTER), f"{FILE} is a Git LFS pointer"),
}
OF_PEFT = {
    "a layer of all-linear": (without_a_layer, r"layers\.1\..*target_modules names it, but there are no tensors"),
    "unknown setting": (settings(spectral_gain=2.0), "spectral_gain=2.0: unknown setting"),
    "unknown setting of 0": (settings(spectral_gain=0), "spectral_gain=0: unknown setting"),
    "modules_to_save": (settings(modules_to_save=["lm_head"]), "modules_to_save"),
    "saved while compiled": (renamed("base_model.model.", "base_model.model._orig_mod."), r"torch\.compile's wrapper"),
    "saved under FSDP": (renamed(".self_attn.", "._fsdp_wrapped_module.self_attn."), "FSDP's wrapper"),
    "another class": (
        renamed("model.model.layers", "model.model.language_model.layers"),
        r"tensors are under 'model\.language_model\.layers', and the base .* has its layers under 'model\.layers'",
    ),
    "no prefix": (renamed("base_model.model.model.layers", "base_model.model.layers"), "are under 'layers', and"),
}
CASES = [
    (kind, what) for kind in ("lora", "dora", "mixlora") for what in (ANY | OF_PEFT if kind == "lora" else ANY)
] + [("peft dora", what) for what in ("missing tensor", "a layer of all-linear")]


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize(("kind", "what"), CASES)
def test_every_way_in_refuses_the_same(kind, what, good, base, tmp_path):
    damage, message = (ANY | OF_PEFT)[what]
    source = tmp_path / "source"
    shutil.copytree(good[kind], source)
    damage(source)
    before = listing(tmp_path)
    for name, read in WAYS[kind].items():
        with pytest.raises(AdapterError, match=message) as error:
            read(source, tmp_path / "out", base)
        assert "\n" not in str(error.value), name
        assert listing(tmp_path) == before, name
    if what in ("unknown setting", "unknown setting of 0", "modules_to_save", "a field twice", "Git LFS pointer"):
        with pytest.raises(AdapterError, match=message):  # what can be known without the base
            info(source)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("kind", WAYS)
def test_every_way_in_takes_a_good_one(kind, good, base, tmp_path):
    for number, read in enumerate(WAYS[kind].values()):
        read(good[kind], tmp_path / str(number), base)
    assert info(good[kind]).parameters


def test_all_linear_leaves_the_head_out(good, base, tmp_path):
    """As PEFT does: the words mean every linear but the head."""
    source = tmp_path / "source"
    shutil.copytree(good["lora"], source)
    edit_json(source / "adapter_config.json", target_modules="All-Linear")
    import_adapter(source, tmp_path / "out", base=str(base))
    from peft import PeftModel

    ours, theirs = (PeftModel.from_pretrained(tiny_base(**SIZE), folder) for folder in (tmp_path / "out", good["lora"]))
    assert torch.equal(logits(ours), logits(theirs))
    assert "lm_head" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]


def test_other_formats_are_told_apart(good, base, tmp_path):
    from formats.helpers import mixlora, reference_folder

    source = reference_folder(tmp_path / "reference", mixlora(tiny_base()))
    with pytest.raises(AdapterError, match="'reference' is a MixLoRA in the format 'reference': convert it"):
        through_the_bank(source, None, base)
    with pytest.raises(AdapterError, match=r"is a whole model .LlamaForCausalLM., not an adapter"):
        through_the_bank(base, None, base)


def test_a_mixlora_of_peft_under_another_prefix(good, base, tmp_path):
    """Its names were read from the layer's number on, whatever stood before."""
    from minilora_hub import register

    register()
    source = peft_mixlora_folder(good["mixlora"], tmp_path / "peft")
    renamed("model.model.layers", "model.vision_tower.layers")(source)
    with pytest.raises(AdapterError, match=r"vision_tower.*: not a tensor under 'base_model\.model\.model\.layers\.'"):
        import_adapter(source, tmp_path / "out", base=str(base))
