"""LoRA, rsLoRA and DoRA on stacked experts compute what folding each expert's update into its weight gives."""

import ast
import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from remote_code.published_0_1_0.configuration_minilora import DoraConfig as EarlierConfig
from tiny import CAUSAL_LM, METHODS, fill_adapter, logits, tiny_config, token_ids
from tiny_architectures import tiny_architecture
from torch.utils._python_dispatch import TorchDispatchMode

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.remote_code.fused_experts import AdaptedExperts, experts_in
from minilora_hub.training.lora_model import LoraConfig, LoraForCausalLM

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe")
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def adapted(family="mixtral", method="dora", base=None, **changes):
    """A filled adapter of this method on a tiny base, in eval mode."""
    base = tiny_architecture(family) if base is None else base
    if family == "deepseek_v3" and method != "dora":  # where PEFT's format has no place for the other linears
        changes = {"target_modules": ["o_proj", "kv_b_proj"], "target_parameters": EXPERTS}
    if method == "dora":
        model = DoraForCausalLM.from_base(base, DoraConfig(r=4, **changes))
    else:
        model = LoraForCausalLM.from_base(base, LoraConfig(r=4, use_rslora=method == "rslora", **changes))
    fill_adapter(model)
    return model.eval()


def folded_weights(base, tensors, model, scaling):
    """{name of a parameter of `base`: m * (W + s B A) / its norm per row}, one matrix at a time, from tensors alone."""
    weights = {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        a, b, m = (tensors.get(f"{name}.{leaf}") for leaf in ("lora_A", "lora_B", "magnitude"))
        path = f"model.{name}"
        if a.dim() == 2:
            path, held = f"{path}.weight", base.get_parameter(f"{path}.weight")
            weights[path] = folded(held, a, b, m, scaling)
            continue
        held = base.get_parameter(path)
        turned = base.config.model_type == "gpt_oss"  # [experts, in, out]
        matrices = [
            folded(w.T if turned else w, a[e], b[e], None if m is None else m[e], scaling) for e, w in enumerate(held)
        ]
        weights[path] = torch.stack([matrix.T for matrix in matrices] if turned else matrices)
    return weights


def folded(w, a, b, m, scaling):
    whole = w + scaling * (b @ a)
    return whole if m is None else whole * (m / whole.norm(dim=1).detach())[:, None]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_folded_weights(family, method):
    base = tiny_architecture(family)
    if family == "gpt_oss":  # biases that show
        for name, parameter in base.named_parameters():
            if name.endswith("_bias"):
                parameter.data.normal_(0, 0.5)
    plain = copy.deepcopy(base)
    model = adapted(family, method, base)
    scaling = 8 / (math.sqrt(4) if method == "rslora" else 4)
    parameters = model.adapter_parameters()
    assert any(parameter.dim() == 3 for parameter in parameters.values())
    weights = folded_weights(plain, {n: p.detach() for n, p in parameters.items()}, model, scaling)
    expected = torch.func.functional_call(plain, weights, (token_ids(),)).logits.detach()
    assert (expected - logits(plain)).abs().max() > 1
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    merged = copy.deepcopy(model).merge()
    for name, weight in weights.items():
        torch.testing.assert_close(merged.get_parameter(name), weight.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "method"), [("mixtral", "dora"), ("gpt_oss", "dora"), ("granitemoe", "rslora")])
def test_gradients_are_those_of_folded_weights(family, method):
    base = tiny_architecture(family)
    plain = copy.deepcopy(base)
    model = adapted(family, method, base).train()
    parameters = model.adapter_parameters()
    weights = folded_weights(plain, parameters, model, 8 / (2 if method == "rslora" else 4))
    ids = token_ids()
    expected = torch.autograd.grad(
        torch.func.functional_call(plain.train(), weights, (ids,), {"labels": ids}).loss, list(parameters.values())
    )
    got = torch.autograd.grad(model(ids, labels=ids).loss, list(parameters.values()))
    for name, one, other in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


class LargestMade(TorchDispatchMode):
    """Remember the shapes of tensors that operators make, views of others not counted."""

    def __init__(self, held):
        super().__init__()
        self.held, self.shapes = {tensor.untyped_storage().data_ptr() for tensor in held}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.held:
                self.shapes.add(tuple(tensor.shape))
        return out


def test_no_full_update_is_formed():
    """Neither of one expert nor of all, forward and backward."""
    model = adapted("mixtral").train()
    experts = next(module for module in model.modules() if isinstance(module, AdaptedExperts))
    held = [tensor for module in model.modules() for tensor in module.parameters()]
    x = torch.randn(11, 32, requires_grad=True)
    selected, weights = torch.randint(4, (11, 2)), torch.rand(11, 2)
    with LargestMade(held) as made:
        experts(x, selected, weights).sum().backward()
    sizes = {shape for shape in made.shapes if {*shape[-2:]} >= {32, 96} or {*shape[-2:]} >= {32, 48}}
    assert (11, 32) in made.shapes
    assert not sizes


def test_a_fresh_adapter_goes_on_every_expert_and_changes_nothing():
    base = tiny_architecture("qwen2_moe")
    before = logits(base)
    model = DoraForCausalLM.from_base(base, tiny_config("dora"))
    assert model.config.target_parameters == EXPERTS
    assert {site.name for site in model.sites} > {f"layers.{index}.mlp.experts" for index in range(2)}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_is_on_the_low_rank_path_in_training_only(method):
    model, without = adapted(method=method, lora_dropout=0.5), adapted(method=method)
    assert torch.equal(logits(model), logits(without))
    torch.manual_seed(0)
    assert not torch.equal(logits(model.train()), logits(model))


def test_saved_and_loaded(tmp_path):
    base = tiny_architecture("gpt_oss")
    plain = copy.deepcopy(base)
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r"layers\.1\..*gate_up_proj": 3.0}}
    model = adapted(base=base, **patterns)
    assert model.adapter_parameters()["layers.0.mlp.experts.down_proj.lora_A"].shape == (4, 2, 48)
    model.save_pretrained(tmp_path)
    loaded = DoraForCausalLM.from_pretrained(tmp_path, base_model=plain)
    assert torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format_version"], config["target_parameters"]) == (3, EXPERTS)
    with pytest.raises(ValueError, match=r"format_version=3: this code reads"):
        EarlierConfig.from_dict(config)


@pytest.mark.slow
def test_a_clean_process_loads_them_with_the_repos_code(tmp_path):
    tiny_architecture("gpt_oss").save_pretrained(tmp_path / "base")
    model = adapted(base=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    torch.save((token_ids(), logits(model)), tmp_path / "expected.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as Auto; sys.modules['minilora_hub'] = None\n"
        "model = Auto.from_pretrained('adapter', trust_remote_code=True); ids, expected = torch.load('expected.pt')\n"
        "with torch.no_grad(): print(torch.equal(model(ids).logits, expected), type(model).__module__[:20])"
    )
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=os.environ | home, check=False
    )
    assert done.stdout.strip() == "True transformers_modules", done.stderr[-3000:]


def test_others_keep_their_format_version():
    model = DoraForCausalLM.from_base(tiny_architecture("llama"), tiny_config("dora"))
    assert (model.config.format_version, model.config.target_parameters) == (1, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The base in half precision, the adapter in float32: as near to float32 as the plain base is."""
    exact, base = adapted(), tiny_architecture("mixtral")
    expected, plain = logits(exact), logits(base)
    half = tiny_architecture("mixtral").to(dtype)
    off = (logits(half).float() - plain).abs().max()
    model = adapted(base=half)
    assert model.adapter_parameters()["layers.0.mlp.experts.down_proj.lora_A"].dtype == torch.float32
    assert (logits(model).float() - expected).abs().mean() <= 2 * off
    with torch.autocast("cpu", torch.bfloat16):
        adapted().train()(token_ids(), labels=token_ids()).loss.backward()


@pytest.mark.slow
def test_compiled_without_a_break():
    model = adapted("qwen3_moe")
    compiled = torch.compile(model.base.model.layers[0].mlp.experts, backend="eager", fullgraph=True)
    x, selected, weights = torch.randn(7, 32), torch.randint(4, (7, 2)), torch.rand(7, 2)
    with torch.no_grad():
        expected = model.base.model.layers[0].mlp.experts(x, selected, weights)
        torch.testing.assert_close(compiled(x, selected, weights), expected, rtol=0, atol=1e-4)


# ---- what is chosen, and what is refused ----


@pytest.mark.parametrize(
    ("given", "linears", "parameters"),
    [
        ({"target_parameters": []}, "all-linear", []),
        ({"target_parameters": ["experts.down_proj"]}, "all-linear", ["experts.down_proj"]),
        ({"target_modules": ["q_proj"]}, ["q_proj"], None),
        ({"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]}, [], None),
    ],
)
def test_what_is_asked_for_is_adapted(given, linears, parameters):
    model = adapted(**given)
    names = {name.rpartition(".")[0] for name in model.adapter_parameters()}
    stacked = {name for name in names if "experts" in name}
    assert model.config.target_modules == linears
    if linears == []:
        assert names == stacked == {"layers.1.mlp.experts.down_proj"}
    elif parameters:
        assert stacked == {f"layers.{index}.mlp.experts.down_proj" for index in range(2)}
    else:
        assert not stacked


def test_the_configurations_of_the_page():
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    section = text.split("## Bases that are mixtures of experts")[1]
    code = ast.parse(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    sites = []
    for line in code.body[1:]:
        config = eval(ast.unparse(line), {"DoraConfig": DoraConfig})
        model = DoraForCausalLM.from_base(tiny_architecture("mixtral"), config)
        kinds = [type(site).__name__ for site in model.sites]
        sites.append((kinds.count("LinearSite"), kinds.count("ExpertsSite")))
    assert sites == [(8, 2), (4, 2), (8, 0)]


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_mixture_is_refused_by_name(family, targets):
    for method in METHODS[1:]:
        with pytest.raises(ValueError, match=r"stacked parameters.* a MixLoRA cannot be put .*experts\.gate_up_proj"):
            CAUSAL_LM[method].from_base(tiny_architecture(family), tiny_config(method, target_modules=targets))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixLoraConfig(target_parameters=["x"]), r"target_parameters=\['x'\]: a MixLoRA does not go on"),
        (lambda: DoraConfig(target_parameters="x"), r"target_parameters='x': must be None or a list"),
        (lambda: DoraConfig(target_modules=[]), r"target_modules=\[\]: must be"),
        (
            lambda: adapted(target_parameters=["gate_proj"]),
            r"target_parameters=\['gate_proj'\]: the base has no such parameters.*'mlp.experts.down_proj', 'mlp",
        ),
        (lambda: adapted("llama", target_parameters=EXPERTS), r"no such parameters of experts; it has \[\]"),
        (lambda: adapted(rank_pattern={"experts.up": 2}), r"rank_pattern\['experts.up'\]: matches no"),
        (lambda: adapted("llama4_text"), r"an adapter cannot be put on them: feed_forward\.experts.*=\[\] leaves"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _eight_bits(experts):
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    "change", [_eight_bits, lambda experts: setattr(experts, "_is_expert_parallel", True)], ids=["float8", "parallel"]
)
def test_weights_that_are_not_plain_are_refused(change):
    base = tiny_architecture("mixtral")
    change(base.model.layers[1].mlp.experts)
    assert not experts_in(base.model.layers[1])
    with pytest.raises(ValueError, match="stacked parameters"):
        DoraForCausalLM.from_base(base, tiny_config("dora"))


def test_a_mixture_without_experts_of_the_base_is_as_before():
    model = MixLoraForCausalLM.from_base(tiny_architecture("llama"), tiny_config("mixlora"))
    assert not any(isinstance(module, AdaptedExperts) for module in model.modules())
