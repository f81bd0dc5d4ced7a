"""Starts that make up for the rounding of a quantized base, against numpy; what an adapter on such a base requires."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import SHORT, inputs_of_linears, write_base
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.adapter_folder.results import Results
from minilora_hub.bases.quantizing import QuantizedFrom, quantize_base
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.compare.found_adapters import common_base, find_adapters
from minilora_hub.errors import AdapterError, BaseModelError, TrainingError
from minilora_hub.training.compensation import compensate, second_moments
from minilora_hub.training.dataset import prepare_data
from minilora_hub.training.models import build_trainee, load_tokenizer
from minilora_hub.training.run import train
from minilora_hub.training.settings import make_settings

RANK = 4
METHODS = {"lora": {}, "dora": {}, "mixlora": {"num_experts": 3}, "mixdora": {"num_experts": 3}}


def need(kind):
    if kind != "nf4":
        pytest.importorskip("torchao")


@pytest.fixture(scope="session")
def quantized(base, tmp_path_factory):
    """Return the folder of the tiny base in a kind, made once."""

    def of(kind):
        need(kind)
        folder = tmp_path_factory.getbasetemp() / f"tiny-{kind}"
        if not folder.exists():
            quantize_base(base, kind, folder, group_size=None if kind == "nf4" else 16)
        return str(folder)

    return of


@pytest.fixture
def started(quantized, rows, tmp_path):
    """Return the model, the moments and the training rows of a start."""

    def of(method, kind, init):
        said = {"method": method, "base": quantized(kind), "data": rows, "r": RANK, "init": init} | METHODS[method]
        settings = make_settings(said)
        resolved = resolve_base(settings.base)
        tokenizer = load_tokenizer(resolved)
        data = prepare_data(settings, tokenizer, 256, tmp_path / init, ends=[256], now=datetime(2026, 1, 1))
        trainee, _ = build_trainee(settings, resolved)
        return trainee.model.eval(), compensate(trainee.model, settings, resolved, data.train), data.train

    return of


def dense(base):
    """The weights of a model's linears, read with the identity."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    found = {}
    for path, module in model.model.layers.named_modules():
        if hasattr(module, "in_features"):
            with torch.no_grad():
                found[f"model.layers.{path}"] = module(torch.eye(module.in_features)).T.double().numpy()
    return found


def inputs_of(base, rows):
    """The inputs of every linear on the exact base, by path: [tokens, in]."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    seen = inputs_of_linears(model)
    with torch.no_grad():
        for example in rows:
            model(torch.tensor([example.input_ids]))
    return {path: torch.cat(held).double().numpy() for path, held in seen.items()}


def updates(model):
    """The first expert's s B A of each adapted linear, by path, and whether all experts have the same."""
    found = {}
    for site in model.sites:
        module = model.base.get_submodule(site.path)
        several = {site.path: module.update} if hasattr(module, "update") else {}
        several |= {f"{site.path}.{name}": update for name, update in getattr(module, "experts", {}).items()}
        for path, update in several.items():
            product = (update.scaling * update.lora_B.double() @ update.lora_A.double()).detach()
            if product.dim() == 3:
                assert torch.equal(product, product[:1].expand_as(product))
                product = product[0]
            found[path] = product.numpy()
    return found


@pytest.mark.parametrize(
    ("method", "kind"),
    [("lora", "nf4"), ("lora", "int2"), ("mixlora", "nf4"), ("dora", "int3")],
)
def test_the_start_is_the_optimum_of_its_weighted_problem(method, kind, base, quantized, started):
    """Elementwise, with numpy's decomposition of (W - Q) D; and not worse than the plain one in this norm."""
    exact, rounded = dense(base), dense(quantized(kind))
    plain = updates(started(method, kind, "loftq")[0])
    model, told, rows = started(method, kind, "calibrated")
    inputs = inputs_of(base, rows)
    found = updates(model)
    assert found.keys() == exact.keys()
    squares = np.zeros(3)
    for path, update in found.items():
        error, d = exact[path] - rounded[path], np.sqrt((inputs[path] ** 2).mean(axis=0))
        for product, scale in ((update, d), (plain[path], np.ones_like(d))):
            u, s, vt = np.linalg.svd(error * scale, full_matrices=False)
            best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK] / scale
            np.testing.assert_allclose(product, best, rtol=1e-3, atol=1e-4 * np.abs(best).max())
        weighted = [np.linalg.norm((error - product) * d) for product in (update, plain[path])]
        assert weighted[0] <= weighted[1] * (1 + 1e-6)
        # Eckart and Young: what is left is what the other singular values hold.
        values = np.linalg.svd(error * d, compute_uv=False)
        assert weighted[0] == pytest.approx(np.sqrt((values[RANK:] ** 2).sum()), rel=1e-4)
        squares += [((m * d) ** 2).sum() for m in (exact[path], error, error - update)]
    assert told.linears == len(found)
    assert told.before == pytest.approx(np.sqrt(squares[1] / squares[0]), rel=1e-4)
    assert told.after == pytest.approx(np.sqrt(squares[2] / squares[0]), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "mixlora", "mixdora"])
def test_the_model_starts_as_the_base_with_these_weights(method, quantized, started):
    """Logits of a plain model whose weights are Q + s B A: DoRA's scale is 1, and the experts' weights sum to one."""
    model, _, _ = started(method, "nf4", "calibrated")
    rounded, found = dense(quantized("nf4")), updates(model)
    plain = AutoModelForCausalLM.from_pretrained(resolve_base(quantized("nf4")).path, dtype=torch.float32)
    plain = plain.dequantize().float().eval()
    with torch.no_grad():
        for path, weight in rounded.items():
            plain.get_submodule(path).weight.copy_(torch.tensor(weight + found[path]))
    ids = torch.arange(20)[None] + 40
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_moments_are_those_of_the_tokens(base, rows, started):
    _, _, data = started("lora", "nf4", "calibrated")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    inputs = inputs_of(base, data)
    for path, moments in second_moments(model, list(inputs), data, 3).items():
        np.testing.assert_allclose(moments.numpy(), (inputs[path] ** 2).mean(axis=0), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:this adapter was trained on a base with fingerprint")  # before the error
@pytest.mark.parametrize(("method", "kind"), [("dora", "nf4"), ("mixlora", "int3")])
def test_an_adapter_loads_on_the_same_quantizer_only(method, kind, base, quantized, rows, tmp_path):
    """Saved and loaded logits are equal; other settings and the exact base are refused, by tools and by loading."""
    out = tmp_path / "out"
    said = SHORT | {"max_steps": 2} | METHODS[method]
    result = train(out, method=method, base=quantized(kind), data=rows, init="calibrated", progress=False, **said)
    assert result.plan.init.startswith("calibrated: rounding error ")
    config = json.loads((out / "config.json").read_text())
    method_of = {"nf4": "bitsandbytes", "int3": "torchao"}
    assert config["base_quantization"]["quant_method"] == method_of[kind]
    assert config["format_version"] == 4
    assert Results.load(out).training.hyperparameters["start"].startswith("calibrated: ")
    model_class = DoraForCausalLM if method == "dora" else MixLoraForCausalLM
    ids = torch.arange(20)[None] + 40
    model = model_class.from_pretrained(out)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(model_class.from_pretrained(tmp_path / "again")(ids).logits, logits)
    recorded = json.loads((out / "recording.json").read_text())
    assert recorded["dtype"] == "float32"
    for other in (base, *([quantized("int4")] if kind == "int3" else [])):
        with pytest.raises(ValueError, match="was trained on a base quantized with"):
            model_class.from_pretrained(out, base_model=other)
        with pytest.raises(AdapterError, match="fingerprint"):
            common_base(other, find_adapters([out]))


def test_large_weights_of_torchao_can_be_trained_on(rows, tmp_path):
    """Weights as large as those that decoding times, to which Trainer's `.to()` must find no other reference."""
    need("int3")
    base = write_base(tmp_path / "base", intermediate_size=1024)
    quantize_base(str(base), "int3", tmp_path / "int3")
    said = SHORT | {"max_steps": 1, "method": "lora", "init": "loftq", "record": False, "progress": False}
    assert train(tmp_path / "out", base=str(tmp_path / "int3"), data=rows, **said).steps == 1


@pytest.mark.slow
def test_a_lora_names_the_quantized_base(quantized, rows, tmp_path):
    """In PEFT's format, so that stock AutoModel loads the quantized base beneath it."""
    out = tmp_path / "out"
    said = SHORT | {"max_steps": 2}
    train(out, method="lora", base=quantized("nf4"), data=rows, init="loftq", progress=False, **said)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    kinds = {type(getattr(module, "base_layer", None)).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"quantize": "nf4"}, "with --quantize nf4: the adapter must name the quantized base"),
        ({"method": "rslora"}, "init='calibrated': needs one of the methods lora, dora"),
        ({"method": "mixlora", "routing_strategy": "switch"}, "not switch routing"),
        ({"init": "zero", "exact_base": "other"}, "exact_base='other': needs --init loftq or calibrated"),
        ({"init": "qera"}, "init='qera': must be one of zero, loftq, calibrated"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(said, error, base, rows):
    with pytest.raises(TrainingError, match=error):
        make_settings({"method": "lora", "base": base, "data": rows, "init": "calibrated"} | said)


def test_bases_without_rounding_or_of_unknown_origin_are_refused(base, quantized, rows, tmp_path):
    said = SHORT | {"method": "lora", "data": rows, "init": "calibrated", "progress": False}
    with pytest.raises(TrainingError, match="does not say which base it was quantized from: pass --exact-base"):
        train(tmp_path / "a", base=base, **said)
    with pytest.raises(TrainingError, match="has the weights of the exact base"):
        train(tmp_path / "b", base=base, exact_base=base, **said)
    changed = write_base(tmp_path / "changed", seed=1)
    copy = tmp_path / "moved"
    quantize_base(str(changed), "nf4", copy)
    write_base(changed, seed=2)
    with pytest.raises(TrainingError, match="was quantized from sha256"):
        train(tmp_path / "c", base=str(copy), **said)
    with pytest.raises(TrainingError, match="was quantized from sha256"):
        train(tmp_path / "d", base=str(copy), exact_base=str(changed), **said)
    shutil.rmtree(changed)
    with pytest.raises(TrainingError, match="pass --exact-base ID if it is elsewhere by now"):
        train(tmp_path / "e", base=str(copy), **said)
    wide, fields = write_base(tmp_path / "wide", intermediate_size=96), json.loads((copy / "config.json").read_text())
    del fields["quantized_from"]  # as of another tool
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(TrainingError, match=r"exact_base: .* is \(96, \d+\) in it, and"):
        train(tmp_path / "f", base=str(copy), exact_base=str(wide), **said)


def test_a_quantized_base_says_what_it_was_made_of(base, quantized, tmp_path):
    made_of = QuantizedFrom.of(Path(quantized("nf4")))
    assert (made_of.base, made_of.revision) == (base, None)
    assert made_of.fingerprint.startswith("sha256:")
    with pytest.raises(BaseModelError, match="is quantized already"):
        quantize_base(quantized("nf4"), "nf4", tmp_path / "twice")
    for kind, arguments, kind_of_error, error in (
        ("int5", {}, ValueError, "to='int5': must be one of nf4, int4"),
        ("nf4", {"group_size": 64}, ValueError, "NF4's groups have 64"),
        ("nf4", {"revision": "v1"}, ValueError, "revision='v1': base .* has no revisions"),
        ("nf4", {}, AdapterError, "must be a folder that is empty or does not exist"),
    ):
        with pytest.raises(kind_of_error, match=error):
            quantize_base(base, kind, Path(quantized("nf4")), **arguments)
    need("int4")
    with pytest.raises(BaseModelError, match="groups of 7 do not divide"):
        quantize_base(base, "int4", tmp_path / "odd", group_size=7)
    assert not (tmp_path / "odd").exists()
