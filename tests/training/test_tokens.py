"""The trained ids are exactly what inference sees, for every kind of tokenizer and template, or the row is refused."""

from __future__ import annotations

from datetime import datetime

import pytest
from tiny_stand_ins import byte_tokenizer
from tiny_tokenizers import END_OF_TURN, KINDS, tokenizer_of
from tokenizers import normalizers, processors
from transformers import ByT5Tokenizer

from minilora_hub.training.data import Row
from minilora_hub.training.sources import BadRow
from minilora_hub.training.tokens import IGNORED, Encoder

# Some answers begin with what a tokenizer may join to the end of the prompt.
ANSWERS = ("yes", " yes", "  yes", "\nyes", "\n\nyes", "[1, 2]", "(x)", "yes ", "café", "1", "<b>")
# What joins: Mistral's first template ends in "]"; ChatML's in one line break.
JOINED = {("mistral-v1", "[1, 2]"), ("mistral-v1", "(x)"), ("mistral-v1-class", "[1, 2]"), ("mistral-v1-class", "(x)")}
JOINED |= {("qwen2.5", "\nyes"), ("qwen2.5", "\n\nyes"), ("embedded", "  yes"), ("embedded", "\n\nyes")}
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def encode(tokenizer, kind: str, fields: dict, **settings):
    return Encoder(tokenizer, **({"max_length": 5000} | settings)).encode(Row("here", kind, fields))


def whole(tokenizer, messages, **settings) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **settings)["input_ids"])


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode([token for token in ids if token != IGNORED], clean_up_tokenization_spaces=False)


def with_template(template: str, **tokens):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_what_inference_sees_or_refused(kind, answer):
    tokenizer, messages = tokenizer_of(kind), turns("Why?", answer, "no", "the sky")
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[kind])
    for conversation in (messages[:2], messages):
        example = encode(tokenizer, "messages", {"messages": conversation})
        if (kind, answer) in JOINED:
            assert isinstance(example, BadRow)
            assert "turn 2: its first characters merge with the prompt's last token" in example.reason
            continue
        ids = whole(tokenizer, conversation)
        assert example.input_ids == ids
        learned = [False] * len(ids)
        for index in range(1, len(conversation), 2):
            prompt = whole(tokenizer, conversation[:index], add_generation_prompt=True)
            assert ids[: len(prompt)] == prompt
            stop = ids.index(end, len(prompt)) + 1
            learned[len(prompt) : stop] = [True] * (stop - len(prompt))
        assert example.labels == [token if kept else IGNORED for token, kept in zip(ids, learned, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_its_completion_are_that_chat(kind):
    tokenizer, messages = tokenizer_of(kind), turns("Why is the sky blue?", "yes")
    chat = encode(tokenizer, "messages", {"messages": messages})
    assert encode(tokenizer, "prompt and completion", {"prompt": messages[0]["content"], "completion": "yes"}) == chat
    assert encode(tokenizer, "prompt and completion", {"prompt": messages[:1], "completion": messages[1:]}) == chat


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_a_rendered_chat_gets_no_second_begin_or_end(kind):
    tokenizer, messages = tokenizer_of(kind), turns("Why?", "yes", "no", "the sky")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    example = encode(tokenizer, "text", {"text": text})
    assert example.input_ids == example.labels == whole(tokenizer, messages)
    # A prompt that is rendered already, and its answer.
    start = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    pair = {"prompt": start, "completion": text[len(start) :]}
    example = encode(tokenizer, "prompt and completion", pair, chat=False)
    given = len(whole(tokenizer, messages[:3], add_generation_prompt=True))
    assert example.input_ids == whole(tokenizer, messages)
    assert example.labels == [IGNORED] * given + example.input_ids[given:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_text_begins_as_the_tokenizer_begins_it_and_ends_once(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("the sky")["input_ids"]
    assert encode(tokenizer, "text", {"text": "the sky"}).input_ids == [*ids, tokenizer.eos_token_id]
    ended = encode(tokenizer, "text", {"text": f"the sky{tokenizer.eos_token}\n"}).input_ids
    assert ended == tokenizer(f"the sky{tokenizer.eos_token}\n")["input_ids"]


def test_a_tokenizer_that_ends_every_text_by_itself_ends_it_once():
    tokenizer = byte_tokenizer(chat=False)
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair=None, special_tokens=[end]
    )
    assert tokenizer("a")["input_ids"] == [*tokenizer("a", add_special_tokens=False)["input_ids"], end[1]]
    for text, expected in [("a", "a<|end|>"), ("a<|end|>", "a<|end|>"), ("a<|end|>\n", "a<|end|>\n")]:
        assert tokenizer.decode(encode(tokenizer, "text", {"text": text}).input_ids) == expected
    example = encode(tokenizer, "prompt and completion", {"prompt": "a", "completion": "b"})
    assert tokenizer.decode(example.input_ids) == "ab<|end|>"
    assert text_of(tokenizer, example.labels) == "b<|end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_prompt_is_what_inference_is_given(kind):
    """The completion's tokens follow those that the prompt has alone, and both decode to the text."""
    tokenizer = tokenizer_of(kind)
    pairs = (("Why?", " yes"), ("Why?", "yes"), ("Why? ", "yes"), ("[", "1]"), ("]", "(x)"), ("", "a"))
    for prompt, completion in pairs:
        fields = {"prompt": prompt, "completion": completion}
        example = encode(tokenizer, "prompt and completion", fields, chat=False)
        given = tokenizer(prompt)["input_ids"]
        assert example.input_ids[: len(given)] == given
        assert example.labels == [IGNORED] * len(given) + example.input_ids[len(given) :]
        assert example.input_ids[-1] == tokenizer.eos_token_id
        together = tokenizer(prompt + completion)["input_ids"]
        assert text_of(tokenizer, example.input_ids[:-1]) == text_of(tokenizer, together)


def test_a_completion_whose_tokens_cannot_follow_the_prompt_is_refused():
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.add_tokens(["ab"])  # one token, which cannot be cut
    fields = {"prompt": "xa", "completion": "b", "note": ""}
    example = encode(tokenizer, "prompt and completion", fields)
    assert tokenizer.decode(example.input_ids) == "xab<|end|>"  # its bytes do follow
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ab", "c")
    bad = encode(tokenizer, "prompt and completion", fields)
    assert "the completion's first characters merge with the prompt's last token" in bad.reason


def test_a_tokenizer_in_python_without_offsets_is_cut_as_well():
    tokenizer = ByT5Tokenizer(extra_ids=3)
    tokenizer.chat_template = CHATML.replace("<|end|>", "</s>").replace("<|user|>", "<extra_id_0>")
    messages = turns("Why?", "yes", "no", "the sky")
    example = encode(tokenizer, "messages", {"messages": messages})
    assert example.input_ids == whole(tokenizer, messages)
    assert text_of(tokenizer, example.labels) == "yes</s>the sky</s>"


# ---- how a template ends an answer ----


@pytest.mark.parametrize(
    ("template", "ends", "learned"),
    [
        # The next turn's first token is what generation stops at (GLM), and after the last answer the eos token.
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", [256, 257], "yes<|user|>the sky<|end|>"),
        # Nothing ends an answer: the eos token after the last one.
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None, "yes\nthe sky\n<|end|>"),
        # Text after the end token belongs to no answer.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|> ##\n{% endfor %}",
            None,
            "yes<|end|>the sky<|end|>",
        ),
        # A second end token after the last turn only (Phi-3).
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|user|>\n{% endfor %}"
            "{% if not add_generation_prompt %}<|end|>{% endif %}",
            [256, 257],
            "yes<|user|>the sky<|user|>",
        ),
    ],
    ids=["next-turn", "none", "text-after", "second-end"],
)
def test_every_answer_ends_with_a_token_that_generation_stops_at(template, ends, learned):
    opening = "<|assistant|>" if "<|{{" in template else "assistant: "
    tokenizer = with_template(template + "{% if add_generation_prompt %}" + opening + "{% endif %}")
    messages = turns("Why?", "yes", "no", "the sky")
    example = encode(tokenizer, "messages", {"messages": messages}, ends=ends)
    ids = whole(tokenizer, messages)
    assert example.input_ids[: len(ids)] == ids
    assert example.input_ids[len(ids) :] in ([], [tokenizer.eos_token_id])
    assert text_of(tokenizer, example.labels) == learned


def test_an_end_token_inside_an_answer_does_not_end_it():
    tokenizer = with_template(CHATML)
    example = encode(tokenizer, "messages", {"messages": turns("Why?", "a<|end|>b", "no", "c")})
    assert text_of(tokenizer, example.labels) == "a<|end|>b<|end|>c<|end|>"


def test_a_template_that_drops_earlier_reasoning_is_refused_for_that_conversation():
    """As Qwen3's: a last answer keeps what it thought, an earlier one loses it."""
    thinking = (
        "{% for m in messages %}{{ '<|user|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
    )
    tokenizer, thought = with_template(thinking), "<think>hm</think>yes"
    assert (
        "turn 2: the chat template renders it differently"
        in encode(tokenizer, "messages", {"messages": turns("Why?", thought, "no", "the sky")}).reason
    )
    example = encode(tokenizer, "messages", {"messages": turns("Why?", thought)})
    assert text_of(tokenizer, example.labels) == f"{thought}<|end|>"
    fields = {"prompt": turns("Why?", thought, "no"), "completion": [{"role": "assistant", "content": thought}]}
    example = encode(tokenizer, "prompt and completion", fields)
    assert example.input_ids == whole(tokenizer, [*fields["prompt"], *fields["completion"]])
    assert text_of(tokenizer, example.labels) == f"{thought}<|end|>"


def test_a_template_that_marks_what_is_generated_agrees():
    marked = CHATML.replace(
        "{{ '<|user|>' + m.role + '\n' + m.content + '<|end|>\n' }}",
        "{{ '<|user|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}",
    )
    assert "generation %}" in marked
    tokenizer, messages = with_template(marked), turns("Why?", "yes", "no", "the sky")
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    example = encode(tokenizer, "messages", {"messages": messages})
    assert example.input_ids == list(encoded["input_ids"])
    assert [label != IGNORED for label in example.labels] == [bool(mark) for mark in encoded["assistant_masks"]]


# ---- what a message says about itself ----


def call(arguments) -> list[dict]:
    function = {"name": "get", "arguments": arguments}
    return [*turns("Why?"), {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


def test_arguments_that_are_json_text_are_written_once():
    tokenizer = tokenizer_of("qwen2.5")
    as_object = encode(tokenizer, "messages", {"messages": call({"city": "SF"})})
    assert '"arguments": {"city": "SF"}}' in text_of(tokenizer, as_object.labels)
    assert encode(tokenizer, "messages", {"messages": call('{"city": "SF"}')}) == as_object
    nothing = encode(tokenizer, "messages", {"messages": call("")})
    assert nothing == encode(tokenizer, "messages", {"messages": call({})})


def test_a_template_that_writes_arguments_as_text_gets_text():
    """As DeepSeek's, which joins them to other texts."""
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = encode(tokenizer, "messages", {"messages": call('{"city":"SF"}')})
    assert text_of(tokenizer, example.labels) == 'get {"city":"SF"}<|end|>'
    assert "the chat template rejects it" in encode(tokenizer, "messages", {"messages": call({"a": 1})}).reason


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}])
def test_a_message_of_weight_0_is_not_learned_and_not_seen_by_the_template(mark):
    tokenizer = with_template(CHATML + "{% for m in messages %}{{ m.weight }}{{ m.loss }}{% endfor %}")
    messages = turns("Why?", "yes", "no", "the sky")
    plain = encode(tokenizer, "messages", {"messages": messages})
    messages[1] |= mark
    messages[3] |= {"weight": 1, "loss": True}
    example = encode(tokenizer, "messages", {"messages": messages})
    assert example.input_ids == plain.input_ids
    assert text_of(tokenizer, example.labels) == "the sky<|end|>"
    everything = encode(tokenizer, "messages", {"messages": messages}, loss_on="all")
    assert text_of(tokenizer, everything.labels) == text_of(tokenizer, plain.input_ids).replace("yes<|end|>", "", 1)
    pair = {"prompt": messages[:3], "completion": messages[3:]}
    assert encode(tokenizer, "prompt and completion", pair, loss_on="all") == everything
    messages[3] |= mark
    assert encode(tokenizer, "messages", {"messages": messages}).reason == "has no token with a loss"
    messages[0] |= mark
    refused = encode(tokenizer, "messages", {"messages": messages}, loss_on="all")
    assert refused.reason == "turn 1: has weight 0, which is only allowed in the assistant's turns"


# ---- the date ----


@pytest.mark.parametrize(
    "date", ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )', "(strftime_now('%d') ~ strftime_now(' %b %Y'))"]
)
def test_the_date_that_a_template_writes_is_the_runs(date):
    tokenizer = with_template("{% set today = " + date + " %}<|user|>{{ today }}<|end|>" + CHATML)
    messages = turns("Why?", "yes")
    for day in (1, 2):
        now = datetime(2026, 3, day, 23, 59)
        for kind, fields in [
            ("messages", {"messages": messages}),
            ("prompt and completion", {"prompt": "Why?", "completion": "yes"}),
        ]:
            ids = encode(tokenizer, kind, fields, now=now).input_ids
            assert tokenizer.decode(ids).startswith(f"<|user|>0{day} Mar 2026<|end|><|user|>user")
    today = encode(tokenizer, "messages", {"messages": messages}).input_ids
    assert today == whole(tokenizer, messages)
