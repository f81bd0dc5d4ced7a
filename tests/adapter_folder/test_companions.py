"""An adapter's own tokenizer, chat template and generation settings travel with it; the base's stand in for them."""

import json

import pytest
from formats.helpers import base_folder, mixlora, peft_folder, peft_mixlora_folder, reference_folder
from tiny import fill_adapter, tiny_base, tiny_config
from tiny_stand_ins import byte_tokenizer
from tiny_tokenizers import END_OF_TURN, KINDS, tokenizer_of
from transformers import AutoTokenizer, GenerationConfig

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM, register
from minilora_hub.errors import AdapterError
from minilora_hub.formats.combine import Combination, combine
from minilora_hub.formats.experts import add_experts
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_adapter, import_as_experts
from minilora_hub.publish.push.build import build

OWN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|user|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [{"role": "user", "content": "hi"}]
SIZE = {"vocab_size": 259, "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None}


def chat_tokenizer():
    """The base's tokens, and a template that ends a turn with <|user|> (257)."""
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = OWN
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose tokenizer has another template, and whose answers end at 256."""
    path = base_folder(tmp_path_factory.mktemp("bases"), **SIZE)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory, base):
    """{dialect: folder} without a tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    register()
    model = mixlora(tiny_base(**SIZE))
    ours = {}
    for name, kind, method in (("mixlora", MixLoraForCausalLM, "mixlora"), ("dora", DoraForCausalLM, "dora")):
        saved = kind.from_base(str(base), tiny_config(method))
        fill_adapter(saved)
        saved.save_pretrained(folder / name)
        for path in folder.glob(f"{name}/*"):
            if path.name.startswith(("tokenizer", "chat_template", "generation")):
                path.unlink()
        ours[name] = folder / name
    return ours | {
        "reference": reference_folder(folder / "reference", model),
        "peft lora": peft_folder(folder / "lora", tiny_base(**SIZE)),
        "peft dora": peft_folder(folder / "peft dora", tiny_base(**SIZE), use_dora=True),
        "peft mixlora": peft_mixlora_folder(ours["mixlora"], folder / "peft mixlora"),
    }


def copied(source, folder, *parts):
    """A copy of an adapter with these of its own: "tokenizer" (with the template), "template", "generation"."""
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    if "tokenizer" in parts:
        chat_tokenizer().save_pretrained(folder)
    if "template" in parts:
        (folder / "chat_template.jinja").write_text(OWN)
    if "generation" in parts:
        GenerationConfig(eos_token_id=[97, 256, 257], max_new_tokens=7).save_pretrained(folder)
    return folder


def written(folder):
    """How a folder's own tokenizer prompts, and its generation settings."""
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    settings = GenerationConfig.from_pretrained(folder)
    return found.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False), settings


PROMPT, BASES_PROMPT = "[user]hi<|user|>[assistant]", "<|user|>hi<|end|><|assistant|>"
IMPORTED = ("reference", "peft lora", "peft dora", "peft mixlora")


@pytest.mark.parametrize("dialect", IMPORTED)
def test_import_keeps_what_is_the_adapters_own(dialect, sources, base, tmp_path):
    source = copied(sources[dialect], tmp_path / "source", "tokenizer", "generation")
    notes = import_adapter(source, tmp_path / "out", base=str(base)).notes
    prompt, settings = written(tmp_path / "out")
    assert prompt == PROMPT
    assert (settings.eos_token_id, settings.max_new_tokens) == ([97, 256, 257], 7)
    assert not any("the base's are used" in note or "answers end at" in note for note in notes)


@pytest.mark.parametrize("dialect", IMPORTED)
def test_import_falls_back_to_the_base_and_says_so(dialect, sources, base, tmp_path):
    notes = import_adapter(sources[dialect], tmp_path / "out", base=str(base)).notes
    prompt, settings = written(tmp_path / "out")
    assert (prompt, settings.eos_token_id) == (BASES_PROMPT, 256)
    assert (
        "tokenizer and chat template, generation settings: the adapter has none of its own, the base's are used"
        in notes
    )
    notes = import_adapter(
        copied(sources[dialect], tmp_path / "t", "template"), tmp_path / "out2", base=str(base)
    ).notes
    prompt, settings = written(tmp_path / "out2")
    assert (prompt, settings.eos_token_id) == (PROMPT, [256, 257])
    assert "tokenizer, generation settings: the adapter has none of its own, the base's are used" in notes
    said = "answers end at '<|end|>', '<|user|>': generation_config.json listed [256], not all of them"
    assert said in notes


@pytest.mark.parametrize(
    ("method", "to"),
    [("dora", "peft"), ("dora", "dense"), ("mixlora", "peft"), ("mixlora", "mixlora"), ("mixlora", "moe")],
)
def test_exports_keep_them_too(method, to, sources, base, tmp_path):
    source = copied(sources[method], tmp_path / "source", "tokenizer", "generation")
    export_adapter(source, tmp_path / "out", to, base=str(base))
    prompt, settings = written(tmp_path / "out")
    assert (prompt, settings.eos_token_id) == (PROMPT, [97, 256, 257])
    made = export_adapter(sources[method], tmp_path / "out2", to, base=str(base))
    assert written(tmp_path / "out2")[0] == BASES_PROMPT
    assert any("tokenizer and chat template" in note and "the base's are used" in note for note in made.notes)
    # Settings that do not list the token with which the template ends a turn are completed.
    (source / "generation_config.json").write_text('{"eos_token_id": 256, "top_k": 3}')
    export_adapter(source, tmp_path / "out3", to, base=str(base))
    settings = written(tmp_path / "out3")[1]
    assert (settings.eos_token_id, settings.top_k) == ([256, 257], 3)


def test_experts_keep_them(sources, base, tmp_path):
    source = copied(sources["mixlora"], tmp_path / "source", "tokenizer", "generation")
    add_experts(source, tmp_path / "out", [0], base=str(base))
    prompt, settings = written(tmp_path / "out")
    assert (prompt, settings.eos_token_id) == (PROMPT, [97, 256, 257])


def test_several_adapters_keep_what_they_agree_on(sources, base, tmp_path):
    same = [copied(sources["peft lora"], tmp_path / name, "tokenizer", "generation") for name in "ab"]
    other = copied(sources["peft lora"], tmp_path / "c", "generation")
    how = Combination("cat", (0.5, 0.5))
    assert combine(same, tmp_path / "same", how, base=str(base)) == []
    assert written(tmp_path / "same")[0] == PROMPT
    notes = combine([same[0], other], tmp_path / "differ", how, base=str(base))
    assert notes == ["tokenizer and chat template, generation settings: the adapters' differ, the base's are used"]
    assert written(tmp_path / "differ")[0] == BASES_PROMPT
    import_as_experts(same, tmp_path / "experts", base=str(base))
    assert written(tmp_path / "experts")[0] == PROMPT


def test_a_push_keeps_a_template_without_a_tokenizer(sources, base, tmp_path):
    source = copied(sources["peft lora"], tmp_path / "source", "template")
    build(source, tmp_path / "built", repo_id="ana/x", license="mit", base_model=str(base))
    assert written(tmp_path / "built")[0] == PROMPT


@pytest.mark.parametrize("kind", ["llama2-class", "llama3", "mistral-v3", "qwen2.5", "gemma", "phi3"])
def test_the_tokenizers_of_families(kind, tmp_path):
    """A base whose template is missing and whose settings know its eos token only, and a chat model's adapter on it."""
    tokenizer_of(kind).save_pretrained(tmp_path / "own")
    own, bases = AutoTokenizer.from_pretrained(tmp_path / "own"), KINDS[kind]()
    bases.chat_template = None
    size = {"vocab_size": max(own.get_vocab().values()) + 1, "eos_token_id": own.eos_token_id, "bos_token_id": None}
    base = base_folder(tmp_path, **size)
    bases.save_pretrained(base)
    source = peft_folder(tmp_path / "source", tiny_base(**size), use_dora=True)
    own.save_pretrained(source)
    import_adapter(source, tmp_path / "out", base=str(base))
    made = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    settings = {"add_generation_prompt": True, "return_dict": True}
    turns = [{"role": "user", "content": "Is the sky blue?"}]
    assert (
        made.apply_chat_template(turns, **settings)["input_ids"]
        == own.apply_chat_template(turns, **settings)["input_ids"]
    )
    listed = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    ends = {own.eos_token_id, own.convert_tokens_to_ids(END_OF_TURN[kind])}
    assert set(listed if isinstance(listed, list) else [listed]) == ends


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_no_tokenizer(name, sources, base, tmp_path):
    source = copied(sources["peft lora"], tmp_path / "source", "tokenizer", "generation")
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n")
    with pytest.raises(AdapterError, match=f"{name} is a Git LFS pointer"):
        import_adapter(source, tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_is_no_tokenizer(sources, base, tmp_path):
    source = copied(sources["peft lora"], tmp_path / "source", "tokenizer")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(AdapterError, match="the tokenizer of adapter 'source' cannot be loaded"):
        import_adapter(source, tmp_path / "out", base=str(base))


def test_more_templates_come_along(sources, base, tmp_path):
    source = copied(sources["peft lora"], tmp_path / "source", "tokenizer")
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": OWN, "tools": "{{ messages[0].content }}"}
    tokenizer.save_pretrained(source)
    import_adapter(source, tmp_path / "out", base=str(base))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_the_base_that_an_adapter_was_trained_on_stays_written(sources, base, tmp_path):
    """An adapter changed with another base at hand was not trained on that one."""
    before = json.loads((sources["mixlora"] / "config.json").read_text())["base_fingerprint"]
    other = base_folder(tmp_path, **SIZE, initializer_range=0.1)
    add_experts(sources["mixlora"], tmp_path / "out", [0], base=str(other))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_fingerprint"] == before
    assert before.startswith("sha256:")
    notes = export_adapter(sources["dora"], tmp_path / "dense", "dense", base=str(other)).notes
    assert any(f"trained on a base with fingerprint {before[:19]}" in note for note in notes)
    notes = export_adapter(sources["dora"], tmp_path / "dense2", "dense", base=str(base)).notes
    assert not any("fingerprint" in note for note in notes)
