"""An adapter written for other engines computes there what it computes here; `minilora` does it from the shell."""

import errno
import json
import os

import pytest
import torch
from commands import main
from formats.helpers import base_folder, listing, mixlora, peft_folder, reference_folder
from peft import PeftModel
from safetensors.torch import load_file
from sweeps import sweep
from tiny import fill_adapter, logits, tiny_base, tiny_config, token_ids
from tiny_stand_ins import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.errors import AdapterError
from minilora_hub.formats.dense import export_dense
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_adapter
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.find import info
from minilora_hub.publish.push.build import build


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")

    def make(family="llama", **changes):
        path = base_folder(folder, family, **changes)
        byte_tokenizer().save_pretrained(path)
        return path

    return make


def dora(base, folder, **changes):
    model = DoraForCausalLM.from_base(str(base), tiny_config("dora", **changes))
    fill_adapter(model)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", sweep(["llama", "qwen2", "phi3", "gpt2"], "llama", "gpt2"))
def test_peft_loads_our_dora(family, bases, tmp_path):
    model = dora(bases(family), tmp_path / "ours", use_rslora=family == "qwen2", rank_pattern={})
    export_adapter(tmp_path / "ours", tmp_path / "out", "peft")
    twin = PeftModel.from_pretrained(tiny_base(family), tmp_path / "out")
    torch.testing.assert_close(logits(twin), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", sweep(["auto", "float32", "bfloat16", "float16"], "auto", "bfloat16"))
@pytest.mark.parametrize("method", ["dora", "peft-lora", "peft-dora"])
def test_dense(method, dtype, bases, tmp_path):
    base = bases("mistral")
    if method == "dora":
        model = dora(base, tmp_path / "source")
    else:
        peft_folder(tmp_path / "source", tiny_base("mistral"), use_dora="dora" in method, name=str(base))
        model = PeftModel.from_pretrained(tiny_base("mistral"), tmp_path / "source")
    export_dense(tmp_path / "source", tmp_path / "out", dtype=dtype, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert type(loaded).__name__ == "MistralForCausalLM"
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    if wanted is torch.float32:
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    else:  # the weights are those merged in float32, rounded once
        exact = AutoModelForCausalLM.from_pretrained(base)
        merged = (
            DoraForCausalLM.from_pretrained(tmp_path / "source", base_model=exact).merge() if method == "dora" else None
        )
        if merged is not None:
            for ours, theirs in zip(merged.parameters(), loaded.parameters(), strict=True):
                assert torch.equal(ours.to(wanted), theirs)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello")["input_ids"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert str(tmp_path) not in card
    assert "base_model:" not in card  # a local folder is nobody else's


def test_a_quantised_base_is_opened_on_request_only(bases, tmp_path):
    """NF4: merged into what the quantised base computes, which is not what the base before was."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(
        bases("llama", hidden_size=64, intermediate_size=64), quantization_config=settings, dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "nf4")
    model = DoraForCausalLM.from_base(str(tmp_path / "nf4"), tiny_config("dora"))
    fill_adapter(model)
    model.save_pretrained(tmp_path / "ours", tokenizer=byte_tokenizer())
    before = listing(tmp_path)
    with pytest.raises(AdapterError, match=r"is quantised .bitsandbytes.*--dequantize"):
        export_dense(tmp_path / "ours", tmp_path / "out")
    assert listing(tmp_path) == before
    export_dense(tmp_path / "ours", tmp_path / "out", dequantize=True, dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(loaded.config, "quantization_config")
    assert (logits(loaded) - logits(quantised)).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("to", "make", "message"),
    [
        ("dense", "mixlora", "is a MixLoRA: its active experts vary by token"),
        ("mixtral", "dora", "is a dora: --to mixtral takes a MixLoRA only; --to dense merges"),
        ("mixlora", "dora", "--to mixlora takes a MixLoRA only"),
        ("peft", "peft", "'source' is in PEFT's format already"),
        ("mixtral", "peft", "'source' is a lora: --to mixtral takes a MixLoRA only; --to dense merges"),
        ("moe", "reference", "a MixLoRA in the format 'reference': convert it with `minilora import` first"),
        ("mixlora", "mixdora", "does not store magnitudes"),
        ("mixlora", "qwen3", "the reference runs on llama"),
        ("mixlora", "patterns", "one rank and alpha for all"),
    ],
)
def test_what_has_no_place_there_is_refused(to, make, message, bases, tmp_path):
    source = tmp_path / "source"
    if make == "peft":
        peft_folder(source, tiny_base(), name=str(bases()))
    elif make == "reference":
        reference_folder(source, mixlora(tiny_base()))
    elif make == "dora":
        dora(bases(), source)
    else:
        family = "qwen3" if make == "qwen3" else "llama"
        changes = {"use_dora": make == "mixdora"} | ({"rank_pattern": {"q_proj": 2}} if make == "patterns" else {})
        MixLoraForCausalLM.from_base(str(bases(family)), tiny_config("mixlora", **changes)).save_pretrained(source)
    before = listing(tmp_path)
    with pytest.raises(AdapterError, match=message):
        export_adapter(source, tmp_path / "out", to)
    assert listing(tmp_path) == before


def test_an_adapter_of_another_base_and_both_names(bases, tmp_path):
    """Of two shapes, and of layers with other names, whichever format it is in."""
    dora(bases(), tmp_path / "ours")
    peft_folder(tmp_path / "theirs", tiny_base(), name=str(bases()))
    other = bases("llama", intermediate_size=64)
    for name, needed in (("ours", r"\(64, 4\)"), ("theirs", r"\(4, 64\)")):
        with pytest.raises(AdapterError, match=rf"adapter '{name}': .*{needed}") as raised:
            export_adapter(tmp_path / name, tmp_path / "out", "dense", base=str(other))
        assert other.name in str(raised.value)
    with pytest.raises(AdapterError, match=rf"adapter 'ours': .*missing layers\.0\.attn\.c_attn.*{bases('gpt2').name}"):
        export_adapter(tmp_path / "ours", tmp_path / "out", "peft", base=str(bases("gpt2")))


def test_a_place_that_cannot_be_written_is_known_first(bases, tmp_path, monkeypatch):
    dora(bases(), tmp_path / "ours")
    before = listing(tmp_path)
    with pytest.raises(AdapterError, match=r"out='/proc/minilora': cannot be written"):
        export_adapter(tmp_path / "ours", "/proc/minilora", "peft")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minilora_hub.formats.exporting.write_peft_folder", full)
    with pytest.raises(AdapterError, match=rf"out='{tmp_path / 'out'}': cannot be written \(No space left on device\)"):
        export_adapter(tmp_path / "ours", tmp_path / "out", "peft")
    assert listing(tmp_path) == before


def test_a_mixlora_as_the_peft_method_and_back(bases, tmp_path):
    from minilora_hub import register

    register()
    model = MixLoraForCausalLM.from_base(str(bases()), tiny_config("mixlora"))
    fill_adapter(model)
    model.save_pretrained(tmp_path / "ours")
    exported = export_adapter(tmp_path / "ours", tmp_path / "peft", "peft")
    assert "register()" in exported.notes[0]
    twin = PeftModel.from_pretrained(tiny_base(), tmp_path / "peft")
    torch.testing.assert_close(logits(twin), logits(model.eval()), rtol=0, atol=1e-4)
    assert info(tmp_path / "peft").layout == "peft-mixlora"
    import_adapter(tmp_path / "peft", tmp_path / "back", base=str(bases()))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"x" * 40)
    for place in ("again", "peft/again"):
        with pytest.raises(AdapterError, match="header too large"):
            import_adapter(tmp_path / "peft", tmp_path / place, base=str(bases()))
    assert not (tmp_path / "again").exists()


# ---- from the shell ----


def test_import_and_export_from_the_shell(bases, tmp_path, capsys):
    """Reference -> ours -> Mixtral and back to the reference, each by one command."""
    model = mixlora(tiny_base())
    source = reference_folder(tmp_path / "source", model)
    code, out = main(capsys, "import", source, "--base", bases(), "--out", tmp_path / "ours")
    assert code == 0
    assert all(line.startswith("note: ") for line in out.err.splitlines())
    assert out.out.startswith(f"{tmp_path / 'ours'} (")
    code, out = main(capsys, "export", tmp_path / "ours", "--to", "mixtral", "--out", tmp_path / "mixtral")
    assert code == 0
    assert "MixtralForCausalLM: " in out.err
    assert "in 3 files; about" in out.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "mixtral")("hello")["input_ids"]
    code, out = main(capsys, "export", tmp_path / "ours", "--to", "mixlora", "--out", tmp_path / "back", "--json")
    assert code == 0
    assert json.loads(out.out)["to"] == "mixlora"
    before, after = (torch.load(tmp_path / name / "adapter_model.bin") for name in ("source", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_several_loras_from_the_shell(bases, tmp_path, capsys):
    folders = [peft_folder(tmp_path / f"l{i}", tiny_base(), seed=i, name=str(bases())) for i in range(3)]
    code, out = main(capsys, "import", *folders, "--out", tmp_path / "ours")
    assert code == 1
    assert out.err.count("\n") == 1
    assert "--attention" in out.err
    code, out = main(
        capsys, "import", *folders, "--out", tmp_path / "ours", "--attention", "mean", "--experts-per-tok", 1, "--json"
    )
    assert code == 0
    assert json.loads(out.out)["method"] == "mixlora"
    config = MixLoraForCausalLM.from_pretrained(tmp_path / "ours").config
    assert (config.num_experts, config.num_experts_per_tok) == (3, 1)


@pytest.mark.parametrize("command", ["import", "export"])
def test_help_shows_an_example(command, capsys):
    code, out = main(capsys, command, "--help")
    assert code == 0
    assert f"Example: minilora {command}" in out.out


def test_a_dense_export_generates_the_same(bases, tmp_path, capsys):
    model = dora(bases(), tmp_path / "ours")
    code, _ = main(
        capsys, "export", tmp_path / "ours", "--to", "dense", "--out", tmp_path / "out", "--dtype", "float32"
    )
    assert code == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(token_ids(), **settings), model.generate(token_ids(), **settings))
    assert not load_file(next((tmp_path / "out").glob("*.safetensors"))).keys() & {"lora_A"}


def test_what_is_imported_can_be_published(bases, tmp_path):
    """The checks of a push pass on what it builds from an imported adapter of each kind."""
    base = bases(vocab_size=259)  # as many as the tokenizer has
    sources = {
        "mixlora": reference_folder(tmp_path / "reference", mixlora(tiny_base(vocab_size=259))),
        "dora": peft_folder(tmp_path / "dora", tiny_base(vocab_size=259), use_dora=True),
        "lora": peft_folder(tmp_path / "lora", tiny_base(vocab_size=259)),
    }
    for method, source in sources.items():
        import_adapter(source, tmp_path / f"ours-{method}", base=str(base))
        built = build(
            tmp_path / f"ours-{method}",
            tmp_path / f"built-{method}",
            repo_id=f"ana/{method}",
            base_id="org/base",
            base_model=str(base),
            license="apache-2.0",
        )
        assert built.method == method
        problems = check_folder(built.folder, base_exists=lambda *_: True, base_license=lambda *_: "apache-2.0")
        assert [problem for problem in problems if problem.blocking] == []
