"""Adapters on bases with heads of every kind: built, trained, saved, and loaded bit-equal, also by a clean process."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_heads
import tiny_stand_ins
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import fill_adapter, tiny_base, tiny_config
from tiny_architectures import tiny_vision_language
from tiny_heads import CASES, checkpoint, has_fresh_head, inputs_of, labels_of, values_of
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, Trainer, TrainingArguments

import minilora_hub
from minilora_hub import DoraConfig, DoraForCausalLM
from minilora_hub.remote_code.heads import HEADS, class_name
from minilora_hub.remote_code.modeling_minilora import adapted_class
from minilora_hub.remote_code.routing import load_balancing_loss

CLEAN_PROCESS = """
import sys
sys.modules["minilora_hub"] = None  # importing it fails
import json, torch, transformers
for folder, auto_name in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_name).from_pretrained(folder, trust_remote_code=True)
    inputs, expected = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        outputs = model(**inputs)
    names = ("logits", "start_logits", "logits_per_image", "last_hidden_state")
    got = outputs[next(name for name in names if name in outputs)]
    assert torch.equal(got, expected), (folder, auto_name)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
print("all equal")
"""


QUICK = (
    ("bert", "AutoModelForSequenceClassification"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("vit", "AutoModelForImageClassification"),
    ("clip", "AutoModelForZeroShotImageClassification"),
)


def some(cases):
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in cases]


def towers_of(name: str) -> str | None:
    return "all" if name in ("clip", "siglip") else None


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("heads")


def built(name, auto_name, folder, method="dora"):
    """(adapted model, plain base) on a checkpoint in `folder`."""
    classes = has_fresh_head(auto_name) and "Question" not in auto_name and "CTC" not in auto_name
    labels = {"num_labels": 3} if classes else {}
    base = checkpoint(name, auto_name, folder / "base")
    model_class = adapted_class("Dora" if method == "dora" else "MixLora", auto_name)
    model = model_class.from_base(base, tiny_config(method, towers=towers_of(name)), **labels)
    return model, base


@pytest.mark.parametrize(("name", "auto_name"), some(CASES))
def test_train_save_load(name, auto_name, tmp_path):
    model, _ = built(name, auto_name, tmp_path)
    inputs = inputs_of(name, auto_name)
    assert (model.config.modules_to_save is not None) == has_fresh_head(auto_name)
    plain = copy.deepcopy(model).unload().eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(values_of(model(**inputs)), values_of(plain(**inputs)), rtol=0, atol=1e-5)
    labels = labels_of(auto_name, inputs)
    if "labels" in labels and "decoder_input_ids" in inputs:
        labels = {"labels": inputs["decoder_input_ids"]}
    model.train()
    outputs = model(**inputs, **labels)
    (outputs.loss if labels else values_of(outputs).square().sum()).backward()
    parameters = model.adapter_parameters()
    unused = [key for key, parameter in parameters.items() if parameter.grad is None and "pooler" not in key]
    assert not unused
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}
    fill_adapter(model)
    model.eval()
    with torch.no_grad():
        trained = values_of(model(**inputs))
        assert (trained - values_of(plain(**inputs))).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    for auto, reference in config["auto_map"].items():
        if auto != "AutoConfig":
            assert reference == f"modeling_minilora.{class_name('Dora', auto)}"
    assert config["architectures"] == [type(model).__name__]
    assert auto_name in config["auto_map"]
    loaded = type(model).from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(values_of(loaded(**inputs)), trained)
    merged = model.merge()
    with torch.no_grad():
        torch.testing.assert_close(values_of(merged(**inputs)), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "auto_name"), [("llama", "AutoModelForSequenceClassification"), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("llama", "AutoModelForTokenClassification"), ("qwen3", "AutoModelForQuestionAnswering"),
        ("modernbert", "AutoModelForMaskedLM"), ("vit", "AutoModelForImageClassification"), ("dinov2", "AutoModel"),
    ))])  # fmt: skip
def test_mixtures_add_their_outputs_to_the_bases_own(name, auto_name, tmp_path):
    minilora_hub.register()
    model, _ = built(name, auto_name, tmp_path, "mixlora")
    inputs = inputs_of(name, auto_name)
    labels = labels_of(auto_name, inputs)
    model.eval()
    with torch.no_grad():
        plain = copy.deepcopy(model).unload().eval()(**inputs)
        outputs = model(**inputs, output_router_logits=True, output_routing=True)
    torch.testing.assert_close(values_of(outputs), values_of(plain), rtol=0, atol=1e-5)
    assert set(plain) <= set(outputs)
    assert len(outputs.router_logits) == len(outputs.selected_experts) == 2
    assert outputs.aux_loss.isfinite()
    if labels:
        model.train()
        model.config.router_aux_loss_coef = 0.0
        torch.manual_seed(0)  # some heads have a dropout
        without = model(**inputs, **labels).loss
        model.config.router_aux_loss_coef = 1.0
        torch.manual_seed(0)
        penalised = model(**inputs, **labels, output_router_logits=True)
        torch.testing.assert_close(penalised.loss - without, penalised.aux_loss, rtol=1e-4, atol=1e-5)
    fill_adapter(model)
    model.eval()
    with torch.no_grad():
        trained = values_of(model(**inputs))
    model.save_pretrained(tmp_path / "adapter")
    loaded = getattr(transformers, auto_name).from_pretrained(tmp_path / "adapter", trust_remote_code=False)
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(values_of(loaded(**inputs)), trained)


@pytest.mark.slow
def test_a_clean_process_loads_them_with_the_repos_code(tmp_path):
    jobs = []
    for at, (name, auto_name) in enumerate(CASES):
        model, _ = built(name, auto_name, tmp_path / str(at))
        fill_adapter(model)
        inputs = inputs_of(name, auto_name)
        folder = tmp_path / str(at) / "adapter"
        model.eval().save_pretrained(folder)
        with torch.no_grad():
            torch.save((inputs, values_of(model(**inputs))), folder / "expected.pt")
        jobs.append((str(folder), auto_name))
    arguments = [sys.executable, "-c", CLEAN_PROCESS, json.dumps(jobs)]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | home, check=False)
    assert done.stdout.strip() == "all equal", done.stderr[-3000:]
    assert "newly initialized" not in done.stderr


@pytest.mark.parametrize(("name", "auto_name", "task"), [
    ("llama", "AutoModelForSequenceClassification", TaskType.SEQ_CLS),
    pytest.param("bert", "AutoModelForTokenClassification", TaskType.TOKEN_CLS, marks=pytest.mark.slow),
    pytest.param("t5", "AutoModelForSeq2SeqLM", TaskType.SEQ_2_SEQ_LM, marks=pytest.mark.slow),
])  # fmt: skip
def test_peft_computes_the_same(name, auto_name, task, tmp_path):
    model, _ = built(name, auto_name, tmp_path)
    inputs = inputs_of(name, auto_name)
    base = copy.deepcopy(model).unload()
    fill_adapter(model)
    model.eval()
    settings = LoraConfig(
        r=4, lora_alpha=8, use_dora=True, task_type=task, target_modules=[site.path for site in model.sites],
        modules_to_save=list(model.config.modules_to_save or ()) or None,
    )  # fmt: skip
    theirs = get_peft_model(base, settings).eval()
    paths = {site.name: site.path for site in model.sites}
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, value in model.adapter_parameters().items():
            site, _, leaf = key.rpartition(".")
            if site in paths:
                leaf = {"magnitude": "lora_magnitude_vector.default.weight"}.get(leaf, f"{leaf}.default.weight")
                parameters[f"base_model.model.{paths[site]}.{leaf}"].copy_(value)
            else:
                parameters[f"base_model.model.{site}.modules_to_save.default.{leaf}"].copy_(value)
        torch.testing.assert_close(values_of(model(**inputs)), values_of(theirs(**inputs)), rtol=1e-4, atol=1e-4)


def test_trainer_trains_a_classification_adapter(tmp_path):
    """On rows whose class is the parity of their first token; it resumes, and the best model is loaded at the end."""
    minilora_hub.register()
    model, _ = built("llama", "AutoModelForSequenceClassification", tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": ids.tolist(), "attention_mask": [1] * 6, "labels": int(ids[-1]) % 2}
        for ids in torch.randint(3, 20, (64, 6), generator=generator)
    ]
    arguments = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=16, max_steps=24, learning_rate=2e-2, report_to=[],
        logging_steps=4, save_steps=12, eval_steps=12, eval_strategy="steps", load_best_model_at_end=True,
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:16])
    assert trainer.label_names == ["labels"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    best = trainer.evaluate()["eval_loss"]
    trainer.save_model(tmp_path / "trained")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert type(loaded) is type(model)
    assert loaded.config.id2label == model.config.id2label
    assert Trainer(loaded, arguments, eval_dataset=rows[:16]).evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    again, _ = built("llama", "AutoModelForSequenceClassification", tmp_path)
    resumed = Trainer(again, arguments, train_dataset=rows, eval_dataset=rows[:16])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    torch.testing.assert_close(again.base.score.weight, loaded.base.score.weight, rtol=1e-5, atol=1e-6)


def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "load.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page.split("## Bases with other heads")[1], re.DOTALL)[1]
    config = transformers.AutoConfig.for_model("bert", **tiny_heads.CONFIGURATIONS["bert"])
    transformers.AutoModel.from_config(config).save_pretrained("base")
    names: dict = {}
    exec(example.replace("org/bert", "base"), names)
    assert capsys.readouterr().out == "['classifier']\n"
    assert type(names["model"]) is minilora_hub.DoraForSequenceClassification
    assert names["model"].config.num_labels == 3


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_layers_that_are_skipped_at_random_are_adapted(name):
    """In the configuration or in a module, as the architecture has it. The trial run does not skip them."""
    rates = {"layerdrop": 0.999} if name == "wav2vec2" else {"encoder_layerdrop": 0.999, "decoder_layerdrop": 0.999}
    config = transformers.AutoConfig.for_model(name, **tiny_heads.CONFIGURATIONS[name] | rates)
    auto_name = "AutoModelForCTC" if name == "wav2vec2" else "AutoModelForSpeechSeq2Seq"
    base = getattr(transformers, auto_name).from_config(config)
    model = adapted_class("Dora", auto_name).from_base(base, DoraConfig(r=2))
    assert model.config.target_modules == "all-linear"
    assert len(model.sites) == {"wav2vec2": 2 * 6, "whisper": 2 * 6 + 2 * 10}[name]
    assert {getattr(base.config, rate) for rate in rates} == {0.999}
    layerdrop = {module.layerdrop for module in base.modules() if "layerdrop" in vars(module)}
    assert layerdrop == (set() if name == "wav2vec2" else {0.999})


def test_the_padding_of_sounds_is_not_read_as_that_of_tokens():
    """Its mask is one of samples, of which many make a token."""
    inputs = inputs_of("wav2vec2", "AutoModelForCTC")
    inputs["attention_mask"] = torch.ones(inputs["input_values"].shape, dtype=torch.long)
    inputs["attention_mask"][1, 300:] = 0
    base = tiny_heads.tiny_head("wav2vec2", "AutoModelForCTC")
    model = adapted_class("MixLora", "AutoModelForCTC").from_base(base, tiny_config("mixlora")).train()
    outputs = model(**inputs, labels=torch.randint(3, 30, (2, 5)), output_router_logits=True)
    expected = load_balancing_loss(outputs.router_logits, model.config.num_experts_per_tok)
    torch.testing.assert_close(outputs.aux_loss, expected, rtol=0, atol=0)


def test_a_mixture_in_a_decoder_reads_the_decoders_padding():
    inputs = inputs_of("t5", "AutoModelForSeq2SeqLM")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 2:] = 0
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    inputs["decoder_attention_mask"][1, 5:] = 0
    base = tiny_heads.tiny_head("t5", "AutoModelForSeq2SeqLM")
    config = tiny_config("mixlora", towers=["decoder"])
    model = adapted_class("MixLora", "AutoModelForSeq2SeqLM").from_base(base, config).train()
    outputs = model(**inputs, labels=inputs["decoder_input_ids"], output_router_logits=True)
    chosen = model.config.num_experts_per_tok
    expected = load_balancing_loss(outputs.router_logits, chosen, inputs["decoder_attention_mask"])
    torch.testing.assert_close(outputs.aux_loss, expected, rtol=0, atol=0)
    assert outputs.aux_loss != load_balancing_loss(outputs.router_logits, chosen, inputs["attention_mask"])


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_routers_on_the_linears_of_a_cross_attention_are_refused(name):
    """Of its linears some read the decoder's tokens and some the encoder's."""
    auto_name = "AutoModelForSpeechSeq2Seq" if name == "whisper" else "AutoModelForSeq2SeqLM"
    base, model_class = tiny_heads.tiny_head(name, auto_name), adapted_class("MixLora", auto_name)
    with pytest.raises(ValueError, match=r'router_scope="linear": the cross-attention of .*take the encoder'):
        model_class.from_base(base, tiny_config("mixlora", router_scope="linear", towers=["decoder"]))
    model = model_class.from_base(base, tiny_config("mixlora", router_scope="linear", towers=["encoder"]))
    assert {site.name.split(".")[0] for site in model.sites} == {"encoder"}


def test_a_mixture_in_a_tower_that_sees_does_not_read_the_padding_of_the_text():
    inputs = inputs_of("clip", "AutoModel")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 2:] = 0
    base = tiny_heads.tiny_head("clip", "AutoModel")
    config = tiny_config("mixlora", towers=["vision_model"])
    model = adapted_class("MixLora", "AutoModel").from_base(base, config).train()
    outputs = model(**inputs, return_loss=True, output_router_logits=True)
    expected = load_balancing_loss(outputs.router_logits, model.config.num_experts_per_tok)
    torch.testing.assert_close(outputs.aux_loss, expected, rtol=0, atol=0)


def test_pipelines_take_them(tmp_path, caplog):
    """Without a word that the model is not supported."""
    minilora_hub.register()
    tiny_stand_ins.tiny_llama().model.save_pretrained(tmp_path / "base")
    tiny_stand_ins.byte_tokenizer().save_pretrained(tmp_path / "base")
    model_class = adapted_class("Dora", "AutoModelForSequenceClassification")
    model = model_class.from_base(str(tmp_path / "base"), DoraConfig(r=2), id2label={0: "bad", 1: "good"})
    model.save_pretrained(tmp_path / "adapter")
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "adapter"))
    assert type(classify.model) is model_class
    assert classify("hello")[0]["label"] in ("bad", "good")
    heard, _ = built("whisper", "AutoModelForSpeechSeq2Seq", tmp_path / "whisper")
    hear = transformers.pipeline(
        "automatic-speech-recognition", model=heard, tokenizer=tiny_stand_ins.byte_tokenizer(),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=8),
    )  # fmt: skip
    assert hear.type == "seq2seq_whisper"
    heard.save_pretrained(tmp_path / "heard")
    assert json.loads((tmp_path / "heard" / "config.json").read_text())["model_type"] == "dora"
    assert "not supported" not in caplog.text


# ---- what is saved whole ----


def test_a_model_in_memory_with_a_fresh_head(tmp_path):
    base = checkpoint("llama", "AutoModelForSequenceClassification", tmp_path)
    given = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
    model = adapted_class("Dora", "AutoModelForSequenceClassification").from_base(given, DoraConfig(r=2))
    assert model.config.modules_to_save == ["score"]
    assert model.adapter_parameters()["score.weight"].requires_grad
    nameless = LlamaForSequenceClassification(given.config)
    nameless.config.name_or_path = ""
    model = adapted_class("Dora", "AutoModelForSequenceClassification").from_base(nameless, DoraConfig(r=2))
    assert model.config.modules_to_save == ["score"]


def test_a_head_that_is_in_the_checkpoint_stays_as_it_is(tmp_path):
    config = transformers.AutoConfig.for_model("llama", **tiny_heads.CONFIGURATIONS["llama"], num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    model_class = adapted_class("Dora", "AutoModelForSequenceClassification")
    model = model_class.from_base(str(tmp_path), DoraConfig(r=2))
    assert model.config.modules_to_save is None
    assert not model.base.score.weight.requires_grad
    assert model.config.format_version == 1
    trained = model_class.from_base(str(tmp_path), DoraConfig(r=2, modules_to_save=["score"]))
    assert trained.base.score.weight.requires_grad
    assert trained.config.format_version == 2
    with torch.no_grad():
        trained.base.score.weight.mul_(2)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = model_class.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.base.score.weight, 2 * model.base.score.weight)


def test_fresh_heads_are_seeded_and_leave_the_random_state_alone(tmp_path):
    base = checkpoint("bert", "AutoModelForSequenceClassification", tmp_path)
    model_class = adapted_class("Dora", "AutoModelForSequenceClassification")
    state = torch.random.get_rng_state()
    one, same, other = (model_class.from_base(base, DoraConfig(r=2), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [model.adapter_parameters()["classifier.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("names", "reason"), [
    (["scores"], r"modules_to_save=\['scores'\]: the base LlamaForCausalLM has no such module"),
    (["mlp"], r"modules_to_save=\['mlp'\]: model\.layers\.0\.mlp\.gate_proj is adapted"),
    ([3], r"modules_to_save=\[3\]: must be None or a list of names"),
    ("lm_head", r"modules_to_save='lm_head': must be None or a list of names"),
])  # fmt: skip
def test_modules_that_cannot_be_saved_are_refused(names, reason):
    with pytest.raises(ValueError, match=reason):
        DoraForCausalLM.from_base(tiny_base(), DoraConfig(r=2, modules_to_save=names))


def test_a_causal_head_can_be_trained_whole(tmp_path):
    base = tiny_base()
    model = DoraForCausalLM.from_base(copy.deepcopy(base), DoraConfig(r=2, modules_to_save=["lm_head", "norm"]))
    assert {key for key in model.adapter_parameters() if not key.startswith("layers.")} == {
        "lm_head.weight", "model.norm.weight",
    }  # fmt: skip
    fill_adapter(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format_version"], list(config["auto_map"])) == (2, ["AutoConfig", "AutoModelForCausalLM"])
    loaded = DoraForCausalLM.from_pretrained(tmp_path, base_model=base)
    assert torch.equal(loaded.base.lm_head.weight, model.base.lm_head.weight)


def test_a_damaged_checkpoint_is_refused_also_under_a_fresh_head(tmp_path):
    base = checkpoint("llama", "AutoModelForSequenceClassification", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if "norm.weight" not in key}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing .*norm\.weight"):
        adapted_class("Dora", "AutoModelForSequenceClassification").from_base(base, DoraConfig(r=2))


def test_a_language_model_never_gets_a_random_head(tmp_path):
    tiny_base().base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        DoraForCausalLM.from_base(str(tmp_path), DoraConfig(r=2))


# ---- towers ----


@pytest.mark.parametrize("method", ["dora", pytest.param("mixlora", marks=pytest.mark.slow)])
def test_a_language_model_that_sees(method, tmp_path):
    """The adapter is in the language model, by default; images go through the base's own tower."""
    base = tiny_vision_language("qwen2_5_vl")
    plain = copy.deepcopy(base)
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 2:7] = torch.tensor([122, 120, 120, 120, 120])
    pixels = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 4, 4]])
    inputs = {
        "input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 120).int(),
    }  # fmt: skip
    auto_name = "AutoModelForImageTextToText"
    model = adapted_class("Dora" if method == "dora" else "MixLora", auto_name).from_base(base, tiny_config(method))
    assert all(site.path.startswith("model.language_model.layers.") for site in model.sites)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-5)
        fill_adapter(model)
        trained = model.eval()(**inputs).logits
        assert not torch.allclose(trained, model(**inputs | {"pixel_values": -pixels}).logits)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert list(config["auto_map"]) == ["AutoConfig", "AutoModel", auto_name]
    assert config["format_version"] == 1
    loaded = type(model).from_pretrained(tmp_path, base_model=plain)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trained)
    answer = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 15)


def test_two_towers_side_by_side_must_be_chosen(tmp_path):
    base = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model("clip", **tiny_heads.CONFIGURATIONS["clip"])
    )
    model_class = adapted_class("Dora", "AutoModel")
    with pytest.raises(ValueError, match=r"which list .*text_model.*vision_model.*pass towers="):
        model_class.from_base(base, DoraConfig(r=2))
    with pytest.raises(ValueError, match=r"towers=\['audio'\]: no list of layers begins so; .*vision_model"):
        model_class.from_base(base, DoraConfig(r=2, towers=["audio"]))
    model = model_class.from_base(base, DoraConfig(r=2, towers=["vision_model"]))
    assert all(site.name.startswith("vision_model.") for site in model.sites)
    assert len(model.sites) == 2 * 6
    image = inputs_of("clip", "AutoModel")["pixel_values"]
    features = [each.get_image_features(pixel_values=image).pooler_output for each in (model, model.base)]
    assert torch.equal(*features)


def test_every_class_can_be_pickled_by_name():
    for prefix in ("Dora", "MixLora"):
        for auto_name in HEADS:
            made = adapted_class(prefix, auto_name)
            assert pickle.loads(pickle.dumps(made)) is made
            assert made.__name__ == class_name(prefix, auto_name)
