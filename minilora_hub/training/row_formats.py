"""Convert rows of ShareGPT and Alpaca to messages, and reject rows that cannot be trained on.

    conversations          [{"from": "human", "value": …}, …] (ShareGPT), with `system` beside it
    instruction, output    texts (Alpaca), with `input`, `system` and `history` ([[question, answer], …]) beside them

Fields that do not affect training are ignored, so files of ms-swift and LLaMA-Factory can be read unchanged. Rows with
fields that would affect it are rejected: preference pairs, rated answers, sounds.
"""

from __future__ import annotations

import json
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}
REJECTED = ("rejected", "rejected_response", "rejected_messages")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def check_learnable(fields: dict[str, Any]) -> None:
    """Check that a row has no unsupported field that affects training.

    Raises:
        ValueError: it has such a field.
    """
    rejected = next((name for name in REJECTED if fields.get(name)), None)
    if rejected:
        raise ValueError(
            f"is a preference pair (it has {rejected!r}), which is not supported here: write the better answer "
            "as completion, after its prompt, or train with TRL's DPOTrainer"
        )
    if isinstance(fields.get("label"), bool) and ("completion" in fields or "messages" in fields):
        raise ValueError(
            "is a rated answer (label is true or false): keep the good ones without label, or train with KTOTrainer"
        )
    media = next((name for name in MEDIA if fields.get(name)), None)
    if media:
        need = "needs --task image-text-to-text" if "image" in media else "only text and pictures can be learned"
        raise ValueError(f"has {media}: {need}")
    if fields.get("chat_template_kwargs"):
        raise ValueError("has chat_template_kwargs, which generation would not give the chat template: leave them out")


def as_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a ShareGPT or Alpaca row as a row of messages, and any other row unchanged.

    Raises:
        ValueError: a field has a wrong type; the message names it.
    """
    if "messages" in fields or {"prompt", "completion"} <= fields.keys():
        return fields
    if "conversations" in fields:
        return fields | {"messages": _sharegpt(fields)}
    if {"instruction", "output"} <= fields.keys():
        return fields | {"messages": _alpaca(fields)}
    return fields


def _sharegpt(fields: dict[str, Any]) -> Any:
    from trl.data_utils import maybe_convert_to_chatml

    turns = fields["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations must be a list of messages, each with from and value")
    messages = maybe_convert_to_chatml({"messages": [dict(turn) for turn in turns]})["messages"]
    for number, turn in enumerate(messages, 1):
        role = turn.get("role")
        if role not in (*SHAREGPT_ROLES, *ROLES):
            known = ", ".join(SHAREGPT_ROLES)
            raise ValueError(f"conversations, turn {number}: from={role!r}: must be one of {known}, {', '.join(ROLES)}")
        turn["role"] = SHAREGPT_ROLES.get(role, role)
    starts_with_system = bool(messages) and messages[0]["role"] == "system"
    return messages if starts_with_system else [*_system(fields), *messages]


def _alpaca(fields: dict[str, Any]) -> list[dict[str, Any]]:
    texts = {name: fields.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}, not a string")
    if not texts["output"].strip():
        raise ValueError("output is empty")
    pairs = fields.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError("history must be a list of pairs: [[question, answer], …]")
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages = _system(fields)
    for asked, answered in [*pairs, (question, texts["output"])]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def _system(fields: dict[str, Any]) -> list[dict[str, Any]]:
    text = fields.get("system")
    if not text:
        return []
    if not isinstance(text, str):
        raise ValueError(f"system is a {type(text).__name__}, not a string")
    return [{"role": "system", "content": text}]


def parsed_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a row, parsed if they are JSON text; None if there are none.

    Raises:
        ValueError: they are not a list of objects.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is not JSON ({error})") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of objects, or a JSON string of one")
    return tools


def check_turn(turn: dict[str, Any]) -> None:
    """Check a message's `weight`, `loss` and tool calls.

    Raises:
        ValueError: one is wrong.
    """
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"weight={weight!r}: must be 0 (no loss) or 1")
    if turn.get("loss") not in (None, True, False):
        raise ValueError(f"loss={turn['loss']!r}: must be true or false")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("tool_calls must be a list of objects")
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str) and arguments:
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ValueError(f"the arguments of a tool call are not JSON ({error})") from None
        if arguments and not isinstance(arguments, dict):
            raise ValueError(f"the arguments of a tool call are a {type(arguments).__name__}, not an object")


def without_nulls(value: Any) -> Any:
    """Return a value without the fields that are None, at any depth.

    An Arrow column has the same fields in every row; fields that a row lacked are None.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
