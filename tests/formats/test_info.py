"""`minilora info` tells what a folder of any format is; nothing of it is loaded."""

import json

import pytest
from commands import main
from formats.helpers import base_folder, mixlora, peft_folder, reference_folder
from tiny import tiny_base

from minilora_hub.errors import AdapterError
from minilora_hub.formats.moe import export_moe
from minilora_hub.publish.find import info


def test_the_reference_format(tmp_path, capsys):
    source = reference_folder(tmp_path / "source", mixlora(tiny_base()), expert_lora={"r": 2, "lora_alpha": 4})
    code, out = main(capsys, "info", source)
    assert code == 0
    lines = dict(line.split(None, 1) for line in out.out.splitlines())
    assert lines["method"].startswith("MixLoRA, format of the mixlora package")
    assert lines["num_experts"] == "4"
    assert lines["top_k"] == "2"
    assert lines["parameters"] == "unknown: the weights are a pickle"
    assert lines["base"].startswith("org/base")
    code, out = main(capsys, "info", source, "--json")
    assert json.loads(out.out)["layout"] == "reference"


def test_exports_and_bases(tmp_path):
    model = mixlora(tiny_base("qwen3"))
    export_moe(model, tmp_path / "moe")
    found = info(tmp_path / "moe")
    assert (found.method, found.layout) == ("Qwen3MoeForCausalLM", "checkpoint")
    assert found.settings["num_experts_per_tok"] == 2
    experts = 4 * 3 * 32 * 48 * 2  # experts, projections, hidden, inner, layers
    plain = sum(p.numel() for p in tiny_base("qwen3").parameters()) - 3 * 32 * 48 * 2
    assert found.parameters == plain + experts + 2 * 4 * 32
    base = base_folder(tmp_path)
    assert info(base).parameters == sum(p.numel() for p in tiny_base().parameters())


def test_peft_in_a_pickle_and_in_shards(tmp_path):
    import torch
    from formats.test_hostile import shard
    from safetensors.torch import load_file

    for name in ("pickle", "shards"):
        peft_folder(tmp_path / name, tiny_base(), use_dora=True)
    whole = info(tmp_path / "pickle")
    assert (whole.method, whole.layout) == ("DoRA", "peft")
    weights = tmp_path / "pickle" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    shard(tmp_path / "shards")
    assert info(tmp_path / "pickle").parameters is None
    assert info(tmp_path / "shards").parameters == whole.parameters


def test_what_is_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"neither config.json nor adapter_config.json"):
        info(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(AdapterError, match="no weights"):
        info(tmp_path / "empty")
