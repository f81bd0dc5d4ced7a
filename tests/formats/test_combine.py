"""Combined adapters are what PEFT's own method makes of them; experts come and go with a measure of the change."""

import json

import pytest
import torch
from formats.helpers import base_folder, edit_json, listing, mixlora, peft_folder
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file
from sweeps import sweep
from tiny import logits, tiny_base
from torch.nn import functional

from minilora_hub import MixLoraForCausalLM, cli
from minilora_hub.errors import AdapterError
from minilora_hub.formats.combine import METHODS, Combination, combine
from minilora_hub.formats.experts import add_experts, drop_experts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("bases"))


def loras(folder, base, *settings):
    return [
        peft_folder(folder / f"lora{i}", tiny_base(), seed=i, name=str(base), **own) for i, own in enumerate(settings)
    ]


def product(folder, path="model.layers.1.self_attn.q_proj"):
    """The whole update of one linear, s B A, as PEFT would add it."""
    model = PeftModel.from_pretrained(tiny_base(), folder)
    return model.get_submodule(f"base_model.model.{path}").get_delta_weight("default").detach()


def peft_combination(folders, method, weights, density, rank):
    """The same by LoraModel.add_weighted_adapter, in a live PEFT model."""
    model = PeftModel.from_pretrained(tiny_base(), folders[0], adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}")
    pruned = {} if method in ("linear", "svd", "cat") else {"density": density}
    ranked = {"svd_rank": rank} if method.endswith("svd") else {}
    names = [f"a{number}" for number in range(len(folders))]
    torch.manual_seed(0)
    model.add_weighted_adapter(names, list(weights), "both", combination_type=method, **pruned, **ranked)
    model.set_adapter("both")
    return model


def test_damaged_results_of_a_source_are_told_before_anything_is_written(base, tmp_path):
    """They are read for the base that it was trained on."""
    folders = loras(tmp_path, base, {}, {})
    (folders[1] / "results.json").write_text('{"format_version": 1')
    with pytest.raises(AdapterError, match=r"results\.json"):
        combine(folders, tmp_path / "out", Combination("linear", (0.5, 0.5)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", sweep(METHODS, "linear", "ties_svd", "cat"))
def test_as_pefts_own_method(method, base, tmp_path, monkeypatch):
    def every_third(tensor, density, rescale):
        mask = (torch.arange(tensor.numel()) % 3 != 0).view(tensor.shape)
        return tensor * mask / density

    # DARE draws its masks in the order of the modules, which is not ours: both draw the same ones here.
    monkeypatch.setattr(merge_utils, "random_pruning", every_third)
    other = {"target_modules": ["q_proj", "v_proj", "up_proj"], "lora_alpha": 3}
    folders = loras(tmp_path, base, {}, other)
    weights, density = (0.7, -0.4), 0.6
    combine(folders, tmp_path / "out", Combination(method, weights, density, 3 if method.endswith("svd") else None))
    theirs = peft_combination(folders, method, weights, density, 3)
    ours = PeftModel.from_pretrained(tiny_base(), tmp_path / "out")
    assert (logits(theirs) - logits(tiny_base())).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_dare_is_seeded_and_leaves_the_random_state_alone(method, base, tmp_path):
    folders = loras(tmp_path, base, {}, {})
    state = torch.get_rng_state()
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        combine(folders, tmp_path / out, Combination(method, (0.5, 0.5), 0.5, seed=seed))
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (load_file(tmp_path / out / "adapter_model.safetensors") for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_cat_is_exact_also_for_rslora_and_other_ranks(base, tmp_path):
    """PEFT's own method would scale the rsLoRA result by the root of its rank."""
    folders = loras(tmp_path, base, {"use_rslora": True}, {"r": 2, "rank_pattern": {"q_proj": 3}, "lora_alpha": 5})
    expected = 0.7 * product(folders[0]) - 0.4 * product(folders[1])
    combine(folders, tmp_path / "out", Combination("cat", (0.7, -0.4)))
    torch.testing.assert_close(product(tmp_path / "out"), expected, rtol=0, atol=1e-5)
    combine(folders, tmp_path / "svd", Combination("svd", (0.7, -0.4), rank=2))
    u, s, vh = torch.linalg.svd(expected)
    torch.testing.assert_close(product(tmp_path / "svd"), (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "how", "r", "others"),
    [
        (({}, {}), Combination("svd", (0.5, 0.5), rank=1000), 8, {}),
        (({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}), Combination("cat", (0.5, 0.5)), 4, {}),
        (({"r": 2}, {"target_modules": ["q_proj"]}), Combination("cat", (0.5, 0.5)), 2, {"q_proj": 6}),
    ],
)
def test_the_rank_that_is_written_is_that_of_the_linears(settings, how, r, others, base, tmp_path):
    """It was the rank that was asked for, or the sum, with a pattern for every linear."""
    combine(loras(tmp_path, base, *settings), tmp_path / "out", how)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (r, r)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert {(path.rpartition(".")[2], rank) for path, rank in config["rank_pattern"].items()} == set(others.items())
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        path = name.removeprefix("base_model.model.").partition(".lora_")[0]
        assert tensor.shape[0 if "lora_A" in name else 1] == config["rank_pattern"].get(path, r)


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        (({}, {}), Combination("mean", (1.0, 1.0)), "method='mean': must be one of linear"),
        (({}, {}), Combination("linear", (1.0,)), r"weights=\[1.0\]: must be one finite number for each of 2"),
        (({}, {}), Combination("ties", (1.0, 1.0), density=0.0), "density=0.0"),
        (({}, {}), Combination("linear", (1.0, 1.0), rank=3), "only methods with svd take it"),
        (({}, {}), Combination("dare_linear", (1.0, 1.0), seed=2**63), f"seed={2**63}: must be an integer from 0"),
        (({},), Combination("linear", (1.0,)), "at least 2"),
        (({}, {"r": 2}), Combination("ties", (1.0, 1.0)), r"ranks must be the same, got \[2, 4\]"),
        (({}, {"use_dora": True}), Combination("svd", (1.0, 1.0)), "ignore DoRA's magnitudes"),
    ],
)
def test_what_cannot_be_combined(settings, how, message, base, tmp_path):
    folders = loras(tmp_path, base, *settings)
    before = listing(tmp_path)
    with pytest.raises((AdapterError, ValueError), match=message):
        combine(folders, tmp_path / "out", how)
    assert listing(tmp_path) == before


def test_a_mixlora_is_not_combined(base, tmp_path):
    MixLoraForCausalLM.from_base(str(base), mixlora(tiny_base()).config).save_pretrained(tmp_path / "mix")
    lora = loras(tmp_path, base, {})[0]
    with pytest.raises(AdapterError, match="whose experts do not match those of another"):
        combine([lora, tmp_path / "mix"], tmp_path / "out", Combination("svd", (1.0, 1.0)))


# ---- experts ----


@pytest.fixture
def trained(base, tmp_path):
    model = mixlora(tiny_base(), num_experts=4)
    model.save_pretrained(tmp_path / "mix", tokenizer=None)
    edit_json(tmp_path / "mix" / "config.json", base_model_name_or_path=str(base))
    return model, tmp_path / "mix"


def rows():
    return [[(7 + 31 * start + 97 * i) % 128 for i in range(12)] for start in range(6)]


def test_dropping_takes_the_least_used_of_each_layer_and_tells_the_change(trained, tmp_path):
    model, source = trained
    change = drop_experts(source, tmp_path / "out", 2)
    ids = [torch.tensor([row]) for row in rows()]
    counts = torch.zeros(2, 4)
    for row in ids:
        for layer, chosen in enumerate(model(row, output_routing=True).selected_experts):
            for expert in chosen.flatten().tolist():
                counts[layer, expert] += 1
    torch.testing.assert_close(torch.tensor(change.load), counts / counts.sum(1, keepdim=True), rtol=0, atol=1e-4)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "out"))
    for layer, kept in enumerate(change.kept):
        assert len(kept) == 2
        assert min(counts[layer][list(kept)]) >= max(counts[layer][[e for e in range(4) if e not in kept]])
        for name in new:
            if name.startswith(f"layers.{layer}.mlp"):
                assert torch.equal(new[name], old[name][list(kept)]), name
            elif name.startswith(f"layers.{layer}."):
                assert torch.equal(new[name], old[name]), name
    small = MixLoraForCausalLM.from_pretrained(tmp_path / "out")
    assert (small.config.num_experts, change.experts) == (2, (4, 2))
    before, after = (torch.cat([logits(m, row)[0] for row in ids]) for m in (model, small))
    p, q = (functional.softmax(part.double(), dim=-1) for part in (before, after))
    assert change.max_logit_difference == pytest.approx((before - after).abs().max().item(), abs=1e-4)
    assert change.kl == pytest.approx((p * (p.log() - q.log())).sum(-1).mean().item(), rel=1e-3)
    assert change.top_token_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert change.kl > 0


def test_clones(trained, tmp_path):
    _, source = trained
    change = add_experts(source, tmp_path / "out", [2, 0])
    assert change.kept == ((0, 1, 2, 3, 2, 0),) * 2
    old, new = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "out"))
    for name, tensor in new.items():
        inside = name.endswith("router") or ".experts." in name
        assert torch.equal(tensor, old[name][[0, 1, 2, 3, 2, 0]] if inside else old[name])
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_experts == 6
    noisy = [add_experts(source, tmp_path / f"noisy{i}", [2], noise=0.1, seed=7) for i in range(2)]
    a, b = (load_file(tmp_path / f"noisy{i}" / "adapter_model.safetensors") for i in range(2))
    router = "layers.0.mlp.router"
    assert torch.equal(a[router], b[router])
    assert 0.03 < (a[router][4] - a[router][2]).std() < 0.3
    assert torch.equal(a[router][:4], old[router])
    assert noisy[0].kl == noisy[1].kl


def test_with_every_expert_active_a_clone_counts_double(base, tmp_path):
    """With all experts chosen, cloning one is the same as doubling its share: a check against the equation."""
    model = mixlora(tiny_base(), num_experts=2, num_experts_per_tok=2)
    model.save_pretrained(tmp_path / "mix", tokenizer=None)
    edit_json(tmp_path / "mix" / "config.json", base_model_name_or_path=str(base))
    add_experts(tmp_path / "mix", tmp_path / "out", [1])
    edit_json(tmp_path / "out" / "config.json", num_experts_per_tok=3)
    cloned = MixLoraForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():  # exp(z1) twice is exp(z1 + log 2), which a router without bias cannot say: route by hand
        for module in model.modules():
            if hasattr(module, "route"):
                original = module.route

                def route(x, leading, original=original):
                    routes = original(x, leading)
                    weights = routes.weights * torch.where(routes.selected == 1, 2.0, 1.0)
                    return routes._replace(weights=weights / weights.sum(-1, keepdim=True))

                module.route = route
    torch.testing.assert_close(logits(cloned), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source, out: drop_experts(source, out, 3), "count=3: must be from 1 to 2"),
        (lambda source, out: drop_experts(source, out, 0), "count=0"),
        (lambda source, out: add_experts(source, out, [4]), r"clone=\[4\]: must name experts from 0 to 3"),
        (lambda source, out: add_experts(source, out, []), r"clone=\[\]"),
        (lambda source, out: add_experts(source, out, [0], noise=-1.0), "noise=-1.0"),
        (lambda source, out: add_experts(source, out, [0], noise=0.1, seed=2**63), f"seed={2**63}: must be an integer"),
        (lambda source, out: add_experts(source, out, [0], prompts=["hello"]), "has a tokenizer"),
    ],
)
def test_changes_that_are_refused(change, message, trained, tmp_path):
    before = listing(tmp_path)
    with pytest.raises((AdapterError, ValueError), match=message):
        change(trained[1], tmp_path / "out")
    assert listing(tmp_path) == before


def test_from_the_shell(trained, base, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        return end.value.code, capsys.readouterr()

    code, out = run("experts", "drop", trained[1], "--count", 1, "--out", tmp_path / "small")
    assert code == 0
    assert "4 -> 3 experts per layer" in out.out
    assert "KL divergence" in out.out
    code, out = run("experts", "add", tmp_path / "small", "--clone", 0, "--out", tmp_path / "again", "--json")
    assert code == 0
    assert json.loads(out.out)["experts"] == [3, 4]
    folders = loras(tmp_path, base, {}, {})
    code, out = run("combine", *folders, "--method", "cat", "--out", tmp_path / "both")
    assert code == 0
    torch.testing.assert_close(
        product(tmp_path / "both"), (product(folders[0]) + product(folders[1])) / 2, rtol=0, atol=1e-5
    )
    assert run("combine", *folders, "--method", "mean", "--out", tmp_path / "x")[0] == 2
    code, out = run("combine", *folders, "--weight", 1, "--out", tmp_path / "x")
    assert code == 1
    assert "one finite number for each of 2 adapters" in out.err
    for command in (["combine"], ["experts", "add"], ["experts", "drop"]):
        code, out = run(*command, "--help")
        assert code == 0
        assert "Example: minilora" in out.out
