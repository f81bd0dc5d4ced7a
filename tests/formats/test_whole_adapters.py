"""Whole LoRAs under routers of every linear: PEFT's Arrow, import, training of the routers, publishing, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from compare.bank_models import run
from formats.helpers import base_folder, peft_folder
from formats.test_arrow import loras
from peft import ArrowConfig, PeftModel, create_arrow_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from tiny import logits, tiny_base, tiny_model, token_ids

from minilora_hub import MixLoraForCausalLM
from minilora_hub.adapter_folder.folders import adapter_facts, only_ours, read_source
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.banked_layers import Group
from minilora_hub.compare.batch import experts_at
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.generation import routing_sums
from minilora_hub.formats.experts import drop_experts
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_as_experts
from minilora_hub.integrations.peft.config import MixLoraPeftConfig
from minilora_hub.integrations.vllm.adapter_reading import read_own_adapter
from minilora_hub.publish.push.build import build
from minilora_hub.remote_code.routed_linear import RoutedLinear
from minilora_hub.remote_code.routing_record import record_routing

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(base_folder(tmp_path_factory.mktemp("bases")))


def made(folders, out, base, **settings):
    import_as_experts(folders, out, base=base, route="all-linears", **settings)
    return MixLoraForCausalLM.from_pretrained(out).eval()


def outputs_of(model, kind):
    """{path: output of the next forward} of every module of this kind."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda m, x, out, path=path: found.__setitem__(path, out))
    return found


@pytest.mark.parametrize(("active", "temperature"), [(2, 0.05), (3, 1.0)])
@pytest.mark.parametrize("targets", [EVERY, ["q_proj", "down_proj"]])
def test_arrow_equals_pefts_on_every_linear(targets, active, temperature, base, tmp_path):
    folders = loras(tmp_path, targets)
    settings = {"router": "arrow", "num_experts_per_tok": active, "temperature": temperature}
    model = made(folders, tmp_path / "out", base, **settings)
    config = ArrowConfig(top_k=active, router_temperature=temperature, rng_seed=1)
    theirs = create_arrow_model(tiny_base(), folders, config).eval()
    ours_by_path, theirs_by_path = outputs_of(model.base, RoutedLinear), outputs_of(theirs.base_model.model, LoraLayer)
    with torch.no_grad():
        expected, found = logits(theirs), logits(model)
    protos = [module for module in theirs.modules() if isinstance(module, ArrowLoraLinearLayer)]
    assert len(protos) == len(ours_by_path) == 2 * len(targets)
    assert ours_by_path.keys() == theirs_by_path.keys()
    for path, out in ours_by_path.items():
        torch.testing.assert_close(out, theirs_by_path[path], rtol=0, atol=1e-5 * float(out.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - logits(tiny_base())).abs().max() > 0.1


def test_one_adapter_alone_is_that_adapter(base, tmp_path):
    """A router that is certain gives what PEFT computes with the adapter; ranks and scalings differ."""
    settings = [{"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]}]
    folders = [
        str(peft_folder(tmp_path / f"lora{n}", tiny_base(), seed=n, **{"target_modules": EVERY, **one}))
        for n, one in enumerate(settings)
    ]
    made(folders, tmp_path / "out", base, num_experts_per_tok=2)
    bank = AdapterBank(tiny_base())
    bank.load("mix", tmp_path / "out")
    ids = token_ids()
    for number, folder in enumerate(folders):
        expected = logits(PeftModel.from_pretrained(tiny_base(), folder).eval(), ids)
        with torch.no_grad(), bank.use(["mix"]), bank.rows(["mix"] * len(ids), [number] * len(ids)):
            alone = bank.model(ids).logits
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)


def test_a_bank_tells_the_mean_over_a_layers_linears(base, tmp_path):
    """Also in a batch with a mixture of blocks, whose output projection sees the rows in another order."""
    whole = made(loras(tmp_path, EVERY), tmp_path / "whole", base, num_experts_per_tok=2)
    tiny_model("llama", "mixlora").save_pretrained(tmp_path / "blocks")
    bank = AdapterBank(tiny_base())
    bank.load("whole", tmp_path / "whole")
    bank.load("blocks", tmp_path / "blocks")
    ids = token_ids(3)
    names = ["blocks", None, "whole"]
    with torch.no_grad(), bank.use(names), bank.rows(names) as rows:
        got = bank.model(ids).logits
        routing = rows.routing
    torch.testing.assert_close(got[2:], logits(whole, ids[2:]), rtol=0, atol=1e-4)
    assert {key: len(part) for key, part in routing[Group(2, 3, "whole")].items()} == {"layers.0": 7, "layers.1": 7}
    told = experts_at({Group(0, 9, "whole"): routing[Group(2, 3, "whole")]}, [4])[0]
    outputs = whole(ids[2:], output_routing=True)
    for layer in range(2):
        dense = torch.zeros(3)
        for selected, weights in list(zip(outputs.selected_experts, outputs.routing_weights, strict=True))[layer * 7 :][
            :7
        ]:
            dense.scatter_add_(0, selected[0, 4], weights[0, 4] / 7)
        mean = dict(zip(told["experts"][layer], told["expert_weights"][layer], strict=True))
        assert [mean.get(expert, 0) for expert in range(3)] == pytest.approx(dense.tolist(), abs=1e-4)


def test_an_evaluation_counts_by_layer(base, tmp_path):
    model = made(loras(tmp_path, EVERY), tmp_path / "out", base, num_experts_per_tok=2)
    ids = token_ids()
    with record_routing() as record, torch.no_grad():
        model(ids)
    sums = routing_sums(record, torch.ones_like(ids))
    assert (sums.tokens, len(sums.chosen), len(sums.entropy)) == (ids.numel(), 2, 2)
    assert [sum(layer) for layer in sums.chosen] == [7 * 2 * ids.numel()] * 2
    p = torch.stack(record.logits[:7]).double().softmax(-1)
    expected = float(-(p * p.log()).sum() / 7) / torch.tensor(3.0).log().item()
    assert sums.entropy[0] == pytest.approx(expected, rel=1e-5)


def test_it_is_published_like_any_mixture(base, tmp_path):
    made(loras(tmp_path, EVERY), tmp_path / "out", base)
    where = {"base_id": "org/base", "base_model": base}
    built = build(tmp_path / "out", tmp_path / "built", repo_id="me/whole", **where)
    card = (built.folder / "README.md").read_text(encoding="utf-8")
    assert "a mixture of 3 LoRA experts on each adapted linear, 2 of them active for each token" in card
    assert "| Routers | one for each adapted linear |" in card
    assert "--to mixtral" not in card
    assert "vllm serve" not in card
    assert adapter_facts(built.folder).detail == "rank 4, 3 experts on each linear, 2 active"
    assert "class RoutedLinear" in (built.folder / "routed_linear.py").read_text(encoding="utf-8")
    assert json.loads((built.folder / "config.json").read_text())["format_version"] == 4


def test_a_card_tells_the_numbers_of_experts(base, tmp_path):
    tiny = tiny_model("llama", "mixlora", num_experts=[2, 5])
    tiny.config.base_model_name_or_path = "org/base"
    tiny.save_pretrained(tmp_path / "mola")
    built = build(tmp_path / "mola", tmp_path / "built", repo_id="me/mola", base_id="org/base", base_model=base)
    card = (built.folder / "README.md").read_text(encoding="utf-8")
    assert "a mixture of 2 to 5 LoRA experts in each feed-forward block" in card
    assert "| Experts | 2 to 5, 2 per token |\n| Experts by layer | 2, 5 |" in card
    facts = adapter_facts(built.folder)
    assert (facts.detail, facts.experts, facts.experts_by_layer) == ("rank 4, 2 to 5 experts, 2 active", 5, (2, 5))


@pytest.mark.parametrize("changes", [{"router_scope": "linear"}, {"num_experts": [2, 3]}])
def test_what_only_our_format_has_is_refused_by_name(changes, tmp_path):
    (tmp_path / "base").mkdir()
    tiny_base().save_pretrained(tmp_path / "base")
    model = tiny_model("llama", "mixlora", **changes)
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    field = only_ours(read_source(tmp_path / "a").config)
    assert field == ", ".join(f"{name}={value!r}" for name, value in changes.items())
    for to in ("peft", "mixlora", "mixtral", "moe"):
        with pytest.raises(AdapterError, match="only our own format has") as refused:
            export_adapter(tmp_path / "a", tmp_path / "out", to)
        assert field in str(refused.value)
    with pytest.raises(AdapterError, match=r"cannot be merged$"):
        export_adapter(tmp_path / "a", tmp_path / "out", "dense")
    with pytest.raises(AdapterError, match="only a mixture with equal blocks"):
        drop_experts(tmp_path / "a", tmp_path / "out", 1)
    with pytest.raises(AdapterError, match="cannot be served by vLLM"):
        read_own_adapter(read_source(tmp_path / "a"), BaseSource.of_model(tiny_base()))
    assert not (tmp_path / "out").exists()


def test_wrong_requests_are_refused(base, tmp_path):
    folders = loras(tmp_path, ["q_proj"])
    with pytest.raises(AdapterError, match="attention='mean': with route all-linears attention is routed"):
        import_as_experts(folders, tmp_path / "out", base=base, route="all-linears", attention="mean")
    with pytest.raises(AdapterError, match="route='linears': must be one of blocks, all-linears"):
        import_as_experts(folders, tmp_path / "out", base=base, route="linears")
    other = loras(tmp_path / "other", ["up_proj"], count=1)
    with pytest.raises(AdapterError, match=r"router='arrow': an adapter has no update of layers\.0\..*router=fresh"):
        import_as_experts([*folders, *other], tmp_path / "out", base=base, route="all-linears", router="arrow")
    with pytest.raises(ValueError, match=r"num_experts=\[2, 3\]: must be one number in the PEFT method"):
        MixLoraPeftConfig(num_experts=[2, 3]).model_config()


def test_experts_alone_are_those_of_every_layer(tmp_path):
    tiny_model("llama", "mixlora", num_experts=[2, 5]).save_pretrained(tmp_path / "mola")
    bank = AdapterBank(tiny_base())
    bank.load("mola", tmp_path / "mola")
    bank.check_solo("mola", 1)
    with pytest.raises(ValueError, match="solo_expert=2: for mola it must be from 0 to 1"):
        bank.check_solo("mola", 2)
    assert run(bank, ["mola", None], token_ids()).isfinite().all()
