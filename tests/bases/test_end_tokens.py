"""Which tokens end an answer: the generation settings', the tokenizer's and the chat template's, in this order."""

from __future__ import annotations

import pytest
from tiny_stand_ins import byte_tokenizer
from tiny_tokenizers import END_OF_TURN, KINDS, tokenizer_of
from transformers import GenerationConfig

from minilora_hub.bases.end_tokens import end_of_turn_id, end_token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_each_kinds_template_says_how_a_turn_ends(kind):
    tokenizer = tokenizer_of(kind)
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == END_OF_TURN[kind]


def test_a_base_whose_generation_settings_do_not_know_its_template():
    """Qwen2.5's base models: ChatML, and generation that ends at <|endoftext|> only."""
    tokenizer = tokenizer_of("qwen2.5")
    end, turn = (tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>"))
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=end)) == [end, turn]


def test_the_generation_settings_own_order_comes_first_and_nothing_twice():
    tokenizer = tokenizer_of("llama3")
    text, turn = (tokenizer.convert_tokens_to_ids(name) for name in ("<|end_of_text|>", "<|eot_id|>"))
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=[7, turn])) == [7, turn, text]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=turn)) == [turn, text]
    assert end_token_ids(tokenizer, None) == end_token_ids(tokenizer, GenerationConfig()) == [text, turn]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),  # white space and text end no answer
        ("{{ raise_exception('one message only') }}", None),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", None),  # no content at all
        ("{% for m in messages %}{{ m.content }} ###<|assistant|><|end|>\n{% endfor %}", "<|assistant|>"),
    ],
)
def test_templates_without_an_end_and_with_text_before_it(template, end):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert end_of_turn_id(tokenizer) == expected
    assert end_token_ids(tokenizer, None) == [tokenizer.eos_token_id, *([] if expected is None else [expected])]


def test_an_added_token_that_is_not_special_ends_a_turn_and_white_space_does_not():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<turn_end>", "\n\n"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n\n<turn_end>{% endfor %}"
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<turn_end>")


def test_nothing_is_known():
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.eos_token = None
    assert end_token_ids(tokenizer, None) == []
