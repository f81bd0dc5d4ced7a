"""A MixLoRA written as a native mixture of experts gives the same logits, loaded by transformers alone."""

import subprocess
import sys

import pytest
import torch
from formats.helpers import listing
from sweeps import sweep
from tiny import fill_adapter, logits, tiny_base, tiny_config, token_ids
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.bases import resolve_base
from minilora_hub.errors import AdapterError
from minilora_hub.formats import checkpoint
from minilora_hub.formats.moe import export_moe, plan_moe

TIED = {"tie_word_embeddings": True}
CASES = [
    ("llama", {}, "MixtralForCausalLM"),
    ("llama", TIED, "MixtralForCausalLM"),
    ("llama", {"num_key_value_heads": 4}, "MixtralForCausalLM"),
    ("llama", {"head_dim": 16}, "MixtralForCausalLM"),
    ("mistral", {}, "MixtralForCausalLM"),
    ("mistral", {"sliding_window": 4} | TIED, "MixtralForCausalLM"),
    ("qwen2", {}, "Qwen2MoeForCausalLM"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} | TIED, "Qwen2MoeForCausalLM"),
    ("qwen3", {}, "Qwen3MoeForCausalLM"),
    ("qwen3", {"head_dim": 16, "attention_bias": True} | TIED, "Qwen3MoeForCausalLM"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "Qwen3MoeForCausalLM"),
    ("olmo2", {}, "FlexOlmoForCausalLM"),
    ("granite", {"attention_bias": True, "residual_multiplier": 0.7, "logits_scaling": 2.0}, "GraniteMoeForCausalLM"),
]


def exported(family, method, changes, tmp_path, **config):
    model = MixLoraForCausalLM.from_base(
        tiny_base(family, biases=changes.get("attention_bias", family == "qwen2"), **{"mlp_bias": False} | changes)
        if family == "granite"
        else tiny_base(family, biases=changes.get("attention_bias", family == "qwen2"), **changes),
        tiny_config(method, **config),
    )
    fill_adapter(model)
    export_moe(model, tmp_path / "out")
    return model


@pytest.mark.parametrize(
    ("method", "family", "changes", "architecture"),
    sweep(
        [(method, *case) for method in ("mixlora", "mixdora") for case in CASES],
        *(("mixlora", *case) for case in (CASES[0], CASES[7], CASES[9], *CASES[11:])),
        ("mixdora", *CASES[5]),
    ),
)
def test_logits_are_the_same(method, family, changes, architecture, tmp_path):
    model = exported(family, method, changes, tmp_path)
    before = logits(model)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded).__name__ == architecture
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ids = token_ids(2, 11)  # longer than the sliding windows
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=1e-4)
    assert torch.equal(logits(model), before)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


def test_the_files_are_those_of_transformers_own_save(tmp_path):
    """The names on disk are what save_pretrained writes, which engines other than transformers read."""
    from safetensors.torch import load_file

    for family, changes, architecture in (CASES[0], CASES[6], CASES[8], CASES[11], CASES[12]):
        exported(family, "mixlora", changes, tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family / "out")
        loaded.save_pretrained(tmp_path / family / "again")
        ours, theirs = (
            {k: v for path in (tmp_path / family / name).glob("*.safetensors") for k, v in load_file(path).items()}
            for name in ("out", "again")
        )
        assert ours.keys() == theirs.keys(), architecture
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), architecture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_tells_what_is_written(dtype, tmp_path):
    for family in ("llama", "qwen2"):
        model = MixLoraForCausalLM.from_base(tiny_base(family).to(dtype), tiny_config("mixlora"))
        plan = plan_moe(model)
        export_moe(model, tmp_path / family)
        files = list((tmp_path / family).glob("*.safetensors"))
        assert len(files) == plan.shards == 3
        headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files]
        sizes = [path.stat().st_size - header for path, header in zip(files, headers, strict=True)]
        assert sum(sizes) == plan.bytes_on_disk
        assert max(sizes) == plan.bytes_of_largest_shard


def test_experts_on_some_projections_only(tmp_path):
    model = exported("llama", "mixlora", {}, tmp_path, target_modules=["q_proj", "up_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixLoraForCausalLM.from_base(tiny_base("phi3"), tiny_config("mixlora")), "base of type 'phi3'"),
        (lambda: MixLoraForCausalLM.from_base(tiny_base("gemma2"), tiny_config("mixlora")), "four norms"),
        (lambda: MixLoraForCausalLM.from_base(tiny_base("gpt2"), tiny_config("mixlora")), "has no gate"),
        (
            lambda: MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora", routing_strategy="top_p")),
            "routing_strategy='top_p'.*only top_k",
        ),
        (
            lambda: MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora", routing_strategy="switch")),
            "routing_strategy='switch'.*only top_k",
        ),
        (lambda: DoraForCausalLM.from_base(tiny_base(), tiny_config("dora")), "only a MixLoRA is a mixture"),
        (
            lambda: MixLoraForCausalLM.from_base(tiny_base("llama", biases=True), tiny_config("mixlora")),
            "attention_bias=True",
        ),
        (
            lambda: MixLoraForCausalLM.from_base(
                tiny_base("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1),
                tiny_config("mixlora"),
            ),
            r"layer_types \['full_attention', 'sliding_attention'\]",
        ),
    ],
)
def test_what_fits_nowhere_is_refused_and_nothing_is_written(make, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        export_moe(make(), tmp_path / "out")
    assert listing(tmp_path) == set()


def test_mixtral_is_only_for_its_own_families(tmp_path):
    model = MixLoraForCausalLM.from_base(tiny_base("qwen3"), tiny_config("mixlora"))
    with pytest.raises(AdapterError, match="llama or mistral in every other layer; it fits Qwen3MoeForCausalLM"):
        export_moe(model, tmp_path / "out", only="MixtralForCausalLM")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    model = MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora"))
    with pytest.raises(AdapterError, match="must be a folder that is empty"):
        export_moe(model, tmp_path)
    assert listing(tmp_path) == {"mine"}


def test_a_full_disk_is_told_before_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    model = MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
        with pytest.raises(AdapterError, match="GB are needed"):
            export_moe(model, tmp_path / "out")

    def fail(path, tensors):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", fail)
    with pytest.raises(AdapterError, match=r"cannot be written \(no space left on device\); nothing is left of it"):
        export_moe(model, tmp_path / "out")
    assert listing(tmp_path) == set()


# A process that loads the shipped MixLoRA on the embedded base and exports it, telling its peak memory each time.
PEAK = """
import json, resource, sys, torch
from pathlib import Path
from minilora_hub import MixLoraForCausalLM
from minilora_hub.formats.moe import export_moe, plan_moe
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = MixLoraForCausalLM.from_pretrained(sys.argv[1], base_model="embedded", dtype=torch.float32)
for tensor in model.parameters():
    tensor.sum()  # weights are mapped until they are read
plan, loaded = plan_moe(model), peak()
export_moe(model, sys.argv[2])
print(json.dumps([loaded, peak(), plan.bytes_of_model, plan.bytes_of_largest_shard, plan.bytes_on_disk]))
"""


@pytest.mark.slow
def test_embedded_base_and_the_memory_of_the_export(tmp_path):
    """Elementwise on a real model; the export adds little more than its largest part to what the model takes."""
    import json
    from pathlib import Path

    adapter = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-mixlora"
    command = [sys.executable, "-c", PEAK, str(adapter), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    loaded, after, held, part, on_disk = json.loads(done.stdout.splitlines()[-1])
    assert on_disk > 1.4e9
    megabytes = [round(size / 1e6) for size in (loaded, after, held, part, on_disk)]
    print("MB: peak after loading, peak after exporting, model, largest part, on disk:", megabytes)
    assert after - loaded < 1.5 * part + 100e6, megabytes
    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32)
    ours = MixLoraForCausalLM.from_pretrained(adapter, base_model=base, dtype=torch.float32)
    ids = torch.randint(0, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = logits(ours, ids)
    del ours, base
    loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded_model, ids), expected, rtol=0, atol=1e-4)
