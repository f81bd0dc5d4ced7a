"""Each adapter is prompted with its own tokenizer and chat template, and ends where those end an answer."""

from __future__ import annotations

import json

import pytest
import torch
from compare.engine_answers import PROMPT, answers, tokens
from formats.helpers import edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_stand_ins import byte_tokenizer, tiny_llama
from tiny_tokenizers import END_OF_TURN, KINDS, tokenizer_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from minilora_hub import cli
from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.compare.prompting import Prompting, Promptings
from minilora_hub.errors import AdapterError

OWN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|user|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Ends a turn with <|user|>, which is neither the tokenizer's eos token nor in the base's generation settings."""
USER, END = 257, 256


def lora(folder, base=None, tokenizer=None, template=None):
    """A random LoRA, with a tokenizer or a chat template beside it."""
    model = get_peft_model(
        base or tiny_llama(eos_token_id=END), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def with_template(template):
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def base():
    """A base without a chat template."""
    return tiny_llama(eos_token_id=END)


@pytest.mark.parametrize("own", ["tokenizer", "template"])
def test_rows_of_one_batch_read_their_own_prompts(own, base, tmp_path):
    """And answer what `generate` answers to them."""
    whole = {"tokenizer": with_template(OWN)} if own == "tokenizer" else {"template": OWN}
    folders = [lora(tmp_path / "plain"), lora(tmp_path / "chat", **whole)]
    lines = []
    engine = CompareEngine(base, folders, tokenizer=byte_tokenizer(chat=False), progress=lines.append)
    assert lines == [
        "  answers end at <|end|>",
        "  + plain: LoRA, rank 4",
        "  + chat: LoRA, rank 4, own chat template, ends at <|end|> <|user|>",
    ]
    read = [engine.prompt_ids(PROMPT, column.adapter) for column in engine.columns]
    decoded = [engine.tokenizer.decode(ids) for ids in read]
    assert decoded == [PROMPT, PROMPT, f"[user]{PROMPT}<|user|>[assistant]"]
    models = [base, *(PeftModel.from_pretrained(tiny_llama(eos_token_id=END), folder).eval() for folder in folders)]
    for updates, model, ids in zip(answers(engine, Sampling(12)), models, read, strict=True):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=[USER, END])
        assert tokens(updates) == alone[0, len(ids) :].tolist()


def test_an_answer_ends_where_the_template_ends_a_turn(base, tmp_path):
    """For the base and for an adapter that brings the template: before, both ran on to the limit."""
    ids = with_template(OWN).apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    said = base.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    place = next(index for index in range(2, 8) if said[index] not in said[:index])
    with torch.no_grad():  # what was said there is now <|user|>
        base.lm_head.weight[[said[place], USER]] = base.lm_head.weight[[USER, said[place]]]
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "chat")  # fresh: it computes what the base does
    with_template(OWN).save_pretrained(tmp_path / "chat")
    adapter = answers(CompareEngine(base, [tmp_path / "chat"], tokenizer=byte_tokenizer(chat=False)), Sampling(20))[1]
    alone = answers(CompareEngine(base, tokenizer=with_template(OWN)), Sampling(20))[0]
    for updates in (adapter, alone):
        assert tokens(updates) == [*said[:place], USER]
        assert updates[-1].reason == "eos"


def test_generation_settings_of_the_adapters_own(base, tmp_path):
    folder = lora(tmp_path / "x")
    (folder / "generation_config.json").write_text('{"eos_token_id": [97, 98]}')
    engine = CompareEngine(base, [folder], tokenizer=byte_tokenizer(chat=False))
    assert engine.prompting("x").ends == {97, 98, END}
    assert engine.prompting().ends == {END}
    edit_json(folder / "generation_config.json", eos_token_id="97")
    with pytest.raises(AdapterError, match="eos_token_id='97': must be a token's number"):
        CompareEngine(base, [folder], tokenizer=byte_tokenizer(chat=False))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"embedded"}))
def test_the_tokenizers_of_families(kind, tmp_path):
    """A base without a template, and an adapter that was trained as a chat model, with one."""
    tokenizer_of(kind).save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    base = KINDS[kind]()
    base.chat_template = None
    model = tiny_llama(vocab_size=max(own.get_vocab().values()) + 1, eos_token_id=own.eos_token_id)
    found = Promptings(model, base)
    prompting = found.of(tmp_path)
    turns = [{"role": "user", "content": "Is the sky blue?"}]
    expected = own.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompting.chat_ids(turns) == expected
    assert prompting.ends == {own.eos_token_id, own.convert_tokens_to_ids(END_OF_TURN[kind])}
    assert found.base.chat_ids(turns) is None
    assert found.base.text_ids("Is the sky blue?") == list(base("Is the sky blue?")["input_ids"])
    assert found.of(tmp_path).tokenizer is prompting.tokenizer  # one for all adapters with the same files


def test_a_text_gets_no_second_beginning_and_no_end():
    tokenizer = tokenizer_of("llama2")
    prompting = Prompting(tokenizer, frozenset())
    ids = prompting.text_ids("yes")
    assert ids[0] == tokenizer.bos_token_id
    assert prompting.text_ids("<s>yes").count(tokenizer.bos_token_id) == 1
    ending = byte_tokenizer(chat=False)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", END)])
    assert ending("yes")["input_ids"][-1] == END
    assert Prompting(ending, frozenset()).text_ids("yes") == ending("yes")["input_ids"][:-1]
    assert Prompting(ending, frozenset()).text_ids("yes<|end|>")[-1] == END  # it is what the user typed


def test_a_token_of_the_adapters_own(base, tmp_path):
    """One that the base has an embedding for is read and written; one that it has none for is refused."""
    larger = byte_tokenizer(chat=False)
    larger.add_tokens(["<turn>"])
    folder = lora(tmp_path / "x", tokenizer=larger)
    wide = tiny_llama(vocab_size=260, eos_token_id=END)
    engine = CompareEngine(wide, [folder], tokenizer=byte_tokenizer(chat=False))
    assert engine.columns[1].detail == "rank 4, own tokenizer"
    assert engine.prompt_ids("a<turn>", "x")[-1] == 259
    assert 259 not in engine.prompt_ids("a<turn>")
    assert (engine.token_text(259, "x"), engine.token_text(259)) == ("<turn>", "")
    with pytest.raises(
        AdapterError,
        match=r"adapter 'x': its tokenizer has a token 259 .'<turn>'., and the base has embeddings for 259",
    ):
        CompareEngine(base, [folder], tokenizer=byte_tokenizer(chat=False))


def test_a_tokenizer_that_cannot_be_read_ends_its_own_rows(base, tmp_path):
    """Where the adapter was registered with the bank by itself; loading it is an error."""
    folder = lora(tmp_path / "x", tokenizer=with_template(OWN))
    (folder / "tokenizer.json").write_text("{}")
    engine = CompareEngine(base, tokenizer=byte_tokenizer(chat=False))
    with pytest.raises(AdapterError, match="the tokenizer of adapter 'x' cannot be loaded"):
        engine.load("x", folder)
    engine.bank.register("x", folder)
    updates = list(engine.stream_rows([Row(PROMPT, None, Sampling(2)), Row(PROMPT, "x", Sampling(2))]))
    last = {update.row: update for update in updates if update.finished}
    assert last[0].reason == "length"
    assert (last[1].reason, "tokenizer of adapter 'x'" in last[1].error) == ("error", True)


def test_a_template_that_refuses_the_prompt_ends_its_own_rows(base, tmp_path):
    folder = lora(tmp_path / "x", template="{{ raise_exception('a system turn must come first') }}")
    engine = CompareEngine(base, [folder], tokenizer=byte_tokenizer(chat=False))
    last = [updates[-1] for updates in answers(engine, Sampling(2))]
    assert [update.reason for update in last] == ["length", "error"]
    assert "the chat template refuses the prompt (TemplateError: a system turn must come first)" in last[1].error


def test_a_reloaded_adapter_is_prompted_as_it_is_now(base, tmp_path):
    engine = CompareEngine(base, [lora(tmp_path / "x")], tokenizer=byte_tokenizer(chat=False))
    assert engine.prompting("x").chat_ids([]) is None
    engine.unload("x")
    engine.load("x", lora(tmp_path / "y", template=OWN))
    assert engine.prompting("x").chat_ids([{"role": "user", "content": "a"}]) is not None


def test_runs_with_one_folder_name_are_told_apart(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    folders = [lora(tmp_path / run / "checkpoint-10") for run in ("a", "b")]
    folders += [lora(tmp_path / "b" / "checkpoint-20"), lora(tmp_path / "c" / "b" / "checkpoint-20")]
    engine = CompareEngine(base, folders, device="cpu")
    names = ["a/checkpoint-10", "b/checkpoint-10", f"{tmp_path.name}/b/checkpoint-20", "c/b/checkpoint-20"]
    assert [column.name for column in engine.columns[1:]] == names
    assert all(updates[-1].reason == "length" for updates in answers(engine, Sampling(2)))
    with pytest.raises(ValueError, match=r"checkpoint-10'\]: each adapter must be given only once"):
        CompareEngine(base, [folders[0], folders[0]], device="cpu")


def test_from_the_shell(tmp_path, capsys):
    tiny_llama(eos_token_id=END).save_pretrained(tmp_path / "base")
    byte_tokenizer(chat=False).save_pretrained(tmp_path / "base")
    lora(tmp_path / "x", template=OWN)
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", str(tmp_path / "x"), "--base", str(tmp_path / "base"), "-p", "hi", "--json"])
    assert end.value.code == 0
    out = capsys.readouterr()
    columns = json.loads(out.out)["columns"]
    assert [column["prompt_text"] for column in columns] == ["hi", "[user]hi<|user|>[assistant]"]
    assert [column["ends"] for column in columns] == [["<|end|>"], ["<|end|>", "<|user|>"]]
    assert "answers end at <|end|>" in out.err
