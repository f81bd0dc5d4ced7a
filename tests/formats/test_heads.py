"""An adapter on the head, as stock PEFT saves it, on bases that tie the head to the embeddings and on others.

PEFT writes the base's own weight beside such an adapter, and computes with the head alone changed. Whatever reads the
file must compute the same: PEFT itself is the reference, logit by logit.
"""

import pytest
import torch
from formats.helpers import base_folder, edit_json, listing
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sweeps import sweep
from tiny import logits, token_ids
from tiny_peft import fill
from transformers import AutoModelForCausalLM

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.errors import AdapterError
from minilora_hub.formats.combine import Combination, combine
from minilora_hub.formats.dense import export_dense
from minilora_hub.formats.importing import import_adapter
from minilora_hub.publish.find import info
from minilora_hub.publish.push.build import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]
ATTENTION = {"phi3": "qkv_proj", "gpt2": "c_attn"}
FILE = "adapter_model.safetensors"
COPY = "base_model.model.lm_head.base_layer.weight"


def on_the_head(folder, base, seed=1, **settings):
    """A LoRA or DoRA on attention and the head, saved by PEFT; its logits."""
    family = AutoModelForCausalLM.from_pretrained(base).config.model_type
    targets = [ATTENTION.get(family, "q_proj"), "lm_head"]
    config = LoraConfig(**({"r": 3, "target_modules": targets, "task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    fill(model, seed=seed)
    model.save_pretrained(folder)
    return logits(model)


def through_the_bank(base, folder):
    bank = AdapterBank(AutoModelForCausalLM.from_pretrained(base))
    bank.load("x", folder)
    with torch.no_grad(), bank.use(["x"]), bank.rows(["x", None]):
        rows = bank.model(token_ids(1).repeat(2, 1)).logits
    torch.testing.assert_close(
        rows[1:], logits(AutoModelForCausalLM.from_pretrained(base), token_ids(1)), atol=1e-4, rtol=0
    )
    return rows[:1]


@pytest.mark.parametrize(("use_dora", "tied"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("family", sweep(["llama", "mistral", "qwen2", "gemma2", "phi3", "gpt2"], "llama"))
def test_every_reader_computes_what_peft_does(family, use_dora, tied, tmp_path):
    base = base_folder(tmp_path, family, tie_word_embeddings=tied)
    want = on_the_head(tmp_path / "source", base, use_dora=use_dora)
    bare = AutoModelForCausalLM.from_pretrained(base)
    assert (want - logits(bare)).abs().max() > 0.1
    assert COPY in load_file(tmp_path / "source" / FILE)

    notes = export_dense(tmp_path / "source", tmp_path / "dense", base=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-4)
    assert torch.equal(merged.get_input_embeddings().weight, bare.get_input_embeddings().weight)
    assert merged.config.tie_word_embeddings is False
    assert any("lm_head is stored separately from" in note for note in notes) == tied

    torch.testing.assert_close(through_the_bank(base, tmp_path / "source"), want[:1], rtol=0, atol=1e-4)

    if not use_dora:  # a DoRA on the head has no place in our format: test_import.py
        import_adapter(tmp_path / "source", tmp_path / "imported", base=str(base))
        assert load_file(tmp_path / "imported" / FILE).keys() == load_file(tmp_path / "source" / FILE).keys() - {COPY}
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "imported")
        assert torch.equal(logits(again), want)


@pytest.mark.parametrize("tied", [False, True])
def test_combined_heads(tied, tmp_path):
    """The exact sum of the updates, and PEFT on its file computes the base plus that sum."""
    base = base_folder(tmp_path, tie_word_embeddings=tied)
    head = None
    for number, weight in enumerate((0.7, -0.4)):
        on_the_head(tmp_path / f"l{number}", base, seed=number, target_modules=["lm_head"])
        tensors = load_file(tmp_path / f"l{number}" / FILE)
        a, b = (tensors[f"base_model.model.lm_head.lora_{leaf}.weight"] for leaf in "AB")
        update = weight * 8 / 3 * b @ a  # PEFT's default alpha is 8
        head = update if head is None else head + update
    combine([tmp_path / "l0", tmp_path / "l1"], tmp_path / "out", Combination("cat", (0.7, -0.4)), base=str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        hidden = model.base_model(token_ids()).last_hidden_state
        want = hidden @ (model.lm_head.weight + head).T
    got = PeftModel.from_pretrained(model, tmp_path / "out")
    torch.testing.assert_close(logits(got), want, rtol=0, atol=1e-4)


def test_a_push_leaves_the_copy_out(tmp_path):
    base = base_folder(tmp_path, tie_word_embeddings=True)
    want = on_the_head(tmp_path / "source", base)
    edit_json(tmp_path / "source" / "adapter_config.json", base_model_name_or_path="org/base")
    build(tmp_path / "source", tmp_path / "built", repo_id="ana/head", license="mit", base_model=str(base))
    assert COPY not in load_file(tmp_path / "built" / FILE)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "built")
    assert torch.equal(logits(again), want)
    assert info(tmp_path / "source").method == "LoRA"


@pytest.mark.parametrize("rows", [128, 130])
def test_other_embeddings_than_the_bases_are_refused(rows, tmp_path):
    """Trained ones and resized ones."""
    base = base_folder(tmp_path, tie_word_embeddings=True)
    on_the_head(tmp_path / "source", base)
    tensors = load_file(tmp_path / "source" / FILE)
    save_file(tensors | {COPY: torch.ones(rows, 32)}, tmp_path / "source" / FILE)
    before = listing(tmp_path)
    for read in (import_adapter, export_dense):
        with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight: differs from lm_head of the base"):
            read(tmp_path / "source", tmp_path / "out", base=str(base))
    with pytest.raises(AdapterError, match=r"adapter 'x': .*differs from lm_head of the base"):
        through_the_bank(base, tmp_path / "source")
    assert listing(tmp_path) == before


def test_a_shared_weight_that_is_no_head_is_refused(tmp_path, monkeypatch):
    """Merging into it would change the other module as well."""
    from minilora_hub.bases.skeleton import BaseSource

    base = base_folder(tmp_path)
    on_the_head(tmp_path / "source", base, target_modules=["q_proj"])
    load = BaseSource.load

    def shared(self, dtype="auto"):
        model = load(self, dtype)
        model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
        return model

    monkeypatch.setattr(BaseSource, "load", shared)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: model\.layers\.1\..* shares its weight"):
        export_dense(tmp_path / "source", tmp_path / "out", base=str(base))


def test_an_update_of_token_embeddings_is_refused_everywhere(tmp_path):
    base = base_folder(tmp_path, tie_word_embeddings=True)
    on_the_head(tmp_path / "source", base, target_modules=["q_proj", "embed_tokens"])
    for read in (import_adapter, export_dense):
        with pytest.raises(AdapterError, match="updates of token embeddings are not supported"):
            read(tmp_path / "source", tmp_path / "out", base=str(base))
    with pytest.raises(AdapterError, match="updates of token embeddings are not supported"):
        through_the_bank(base, tmp_path / "source")
