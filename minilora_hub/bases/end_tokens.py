"""The tokens that end an answer, from a tokenizer and a base's generation settings.

Training includes them, the saved generation settings list them, and generation stops at them. They are defined in three
places that may disagree: Qwen2.5's base models have a ChatML template whose turns end with ``<|im_end|>``, but their
generation settings list only ``<|endoftext|>``.
"""

from __future__ import annotations

from typing import Any

PROBE: list[dict[str, Any]] = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


def end_token_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Return the ids of all tokens that end an answer, without duplicates.

    Args:
        tokenizer: a tokenizer of transformers, a processor with one, or None for the generation settings' tokens alone.
        generation_config: the base's GenerationConfig, or None.

    Returns:
        The ids in `generation_config.eos_token_id` in their order, then the tokenizer's eos token, then the token with
        which the chat template ends an answer (see `end_of_turn_id`). Empty where none of them is defined.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    if listed is None:
        listed = []
    candidates = [listed] if isinstance(listed, int) else list(listed)
    if tokenizer is not None:
        candidates += [getattr(tokenizer, "tokenizer", tokenizer).eos_token_id, end_of_turn_id(tokenizer)]
    return list(dict.fromkeys(int(token) for token in candidates if token is not None))


def end_of_turn_id(tokenizer: Any) -> int | None:
    """Return the id of the token with which the chat template ends an assistant's last turn.

    It is the first special token, or other added token that is not white space, that follows the answer's text.

    Returns:
        None where there is no template, where it writes no such token, or where it refuses a question and an answer.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    writer, probe = tokenizer, PROBE
    if hasattr(writer, "tokenizer"):  # a processor, whose template expects the parts of a turn
        tokenizer = writer.tokenizer
        probe = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in PROBE]
    try:
        text = str(writer.apply_chat_template(probe, tokenize=False))
    except (TemplateError, TypeError, KeyError, ValueError):
        return None  # a template for other conversations, which says nothing about how an answer ends
    _, found, tail = text.rpartition(PROBE[-1]["content"])
    if not found:
        return None
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if str(entry).strip()}
    known = added | set(tokenizer.all_special_ids)
    tokens = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in tokens if token in known), None)
