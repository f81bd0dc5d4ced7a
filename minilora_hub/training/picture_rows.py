"""Read and encode rows with pictures: chats as TRL takes them.

    images, messages             or `image`; `prompt` and `completion` instead of `messages`
    messages                     with parts {"type": "image", "image": …} in a turn's content

A picture is the path of a file, relative to the file of rows, or {"bytes": …} as `datasets.Image` stores it. Where a
turn's content is a text, the pictures of `images` are put before the first question; otherwise they take the places of
the parts {"type": "image"}. Torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

from minilora_hub.training import data
from minilora_hub.training.data import Row
from minilora_hub.training.row_formats import as_messages
from minilora_hub.training.sources import BadRow
from minilora_hub.training.tokens import Encoder, Example, dated_template

TASK = "image-text-to-text"
COLUMNS = ("images", "image")
TURNS = ("messages", "prompt", "completion")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Of pictures. Others can start programs when they are opened, as EPS does."""
TAG = "<image>"
"""What rows for other trainers have in a text where a picture belongs."""


def has_pictures(value: dict[str, Any]) -> bool:
    """Return whether a row has pictures, in a column of their own or in its messages."""
    parts = (part for name in TURNS for turn in _turns(value.get(name)) for part in _parts(turn))
    return any(value.get(name) for name in COLUMNS) or any(part.get("type") == "image" for part in parts)


def checked(place: str, value: Any) -> Row | BadRow:
    """Return a parsed value as a row of turns with their pictures in place, or as a bad row with the reason."""
    try:
        return _checked(place, value)
    except ValueError as error:
        return BadRow(place, str(error).rstrip("."))


def _checked(place: str, value: Any) -> Row | BadRow:
    from trl.data_utils import prepare_multimodal_messages

    fields = value
    pictures: list[Any] = []
    if isinstance(value, dict):
        fields = as_messages({name: content for name, content in value.items() if content is not None})
        columns = [fields.pop(name) for name in COLUMNS if name in fields]
        pictures = [picture for column in columns for picture in (column if isinstance(column, list) else [column])]
    texts = data.checked(place, _without_pictures(fields))
    if isinstance(texts, BadRow):
        return texts
    if texts.kind == "text":
        raise ValueError("has text alone: rows with pictures need messages, or prompt and completion")
    if texts.fields.get("tools") or any(turn.get("tool_calls") for name in TURNS for turn in _turns(fields.get(name))):
        raise ValueError("has tools, which are not supported beside pictures")
    before, after = fields.get("prompt", []), fields.get("completion", [])
    if isinstance(before, str):
        before, after = [{"role": "user", "content": before}], [{"role": "assistant", "content": after}]
    turns = [*before, *after] if texts.kind != "messages" else fields["messages"]
    if any(part["type"] == "image" for turn in turns if turn["role"] == "assistant" for part in _parts(turn)):
        raise ValueError("has a picture in a turn of the assistant: only texts can be learned")
    turns = [_named(turn) for turn in turns]
    _check_places(turns, len(pictures))
    turns = prepare_multimodal_messages(turns, pictures)
    for part in (part for turn in turns for part in _parts(turn) if part["type"] == "image"):
        _check_picture(part["image"])
    return Row(place, TASK, {"turns": turns, "first": len(before) if texts.kind != "messages" else 0})


def _turns(value: Any) -> list[dict[str, Any]]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _without_pictures(fields: Any) -> Any:
    """Return a row whose turns hold the texts of their parts alone, by which it is checked as other rows are."""
    if not isinstance(fields, dict):
        return fields

    def flat(turn: Any) -> Any:
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, list):
            return turn
        for number, part in enumerate(content, 1):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(f"content, part {number}: must be of type text, with a text, or image; got {kind!r}")
        return turn | {"content": "".join(part.get("text", "") for part in content)}

    return fields | {n: [flat(turn) for turn in fields[n]] for n in TURNS if isinstance(fields.get(n), list)}


def _named(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn whose pictures are under ``image``."""
    if not isinstance(turn.get("content"), list):
        return turn
    parts = []
    for part in turn["content"]:
        found = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
        bare = {"type": part["type"]} | ({"text": part["text"]} if part["type"] == "text" else {})
        parts.append(bare if found is None else bare | {"image": found})
    return turn | {"content": parts}


def _check_places(turns: list[dict[str, Any]], count: int) -> None:
    """Check that each of `count` pictures has a place: the first question, or a part that names no picture itself."""
    first = next((turn["content"] for turn in turns if turn["role"] == "user"), None)
    if count and not isinstance(first, str):
        bare = sum(part["type"] == "image" and "image" not in part for turn in turns for part in _parts(turn))
        if bare != count:
            raise ValueError(f'has {count} pictures of its own and {bare} parts {{"type": "image"}} for them')


def _check_picture(picture: Any) -> None:
    given = picture.get("bytes") or picture.get("path") if isinstance(picture, dict) else picture
    if isinstance(given, str) and "://" in given:
        raise ValueError(f"picture {given[:60]!r}: is a URL: download it, and name the file")
    if isinstance(given, str) and "\0" in given:
        raise ValueError(f"picture {given[:60]!r}: is not the path of a file")
    if not isinstance(given, (str, bytes)) or not given:
        raise ValueError(f"a picture must be the path of a file, got {str(picture)[:60]!r}")


def stored(picture: Any, folder: Path | None) -> dict[str, Any]:
    """Return a picture as it is kept beside the tokens: its bytes, or the path of its file.

    Args:
        picture: as in a row.
        folder: where relative paths begin. None: the rows come from the Hub, and may not name files of this machine.

    Raises:
        ValueError: there is no such file, or rows from the Hub name a file.
    """
    content = picture.get("bytes") if isinstance(picture, dict) else picture
    if isinstance(content, bytes):
        return {"bytes": content, "path": None}
    name = picture["path"] if isinstance(picture, dict) else picture
    if folder is None:
        raise ValueError(
            f"picture {Path(name).name!r}: is a file of its own; only pictures within the rows are read from the Hub, "
            "as in Parquet files (data_revision='refs/convert/parquet')"
        )
    path = (folder / name).absolute()
    if not path.is_file():
        raise ValueError(f"picture {name!r}: there is no such file beside the rows")
    return {"bytes": None, "path": str(path)}


def _digest(picture: dict[str, Any]) -> bytes:
    """Return the hash of a picture that `stored` returned."""
    if picture["bytes"] is not None:
        return hashlib.sha256(picture["bytes"]).digest()
    with open(picture["path"], "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def opened(picture: dict[str, Any]) -> Any:
    """Open a picture that `stored` returned, in RGB, turned as its metadata say.

    Raises:
        Exception: it is damaged, which may fail anywhere in Pillow, or has more pixels than Pillow holds to be safe: a
            small file can take gigabytes.
    """
    from PIL import Image
    from transformers.image_utils import load_image

    given = picture["path"] if picture["bytes"] is None else BytesIO(picture["bytes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(given, formats=FORMATS) as image:
            return load_image(image)


def with_pictures(turns: list[dict[str, Any]], pictures: list[Any]) -> list[dict[str, Any]]:
    """Return turns whose parts of type image hold these pictures, in their order."""
    remaining = iter(pictures)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": next(remaining)} if part["type"] == "image" else part

    return [turn | {"content": [filled(part) for part in _parts(turn)]} for turn in turns]


class PictureEncoder(Encoder):
    """Converts rows with pictures to examples, whose tokens are those that the base's processor makes of the chat.

    Args:
        processor: the base's.
        **arguments: as of `Encoder`.

    Attributes:
        template: the chat template; a call of it that writes the date writes that of the run's beginning.
        digest: hash of all pictures so far.
    """

    def __init__(self, processor: Any, **arguments: Any) -> None:
        now = arguments.pop("now", None)
        super().__init__(processor.tokenizer, **arguments)
        template = getattr(processor, "chat_template", None)
        if isinstance(template, dict):  # several with names
            template = template.get("default")
        self.processor, self.has_template = processor, bool(template)
        self.template = dated_template(template, now) if isinstance(template, str) and now else template
        self.digest = hashlib.sha256()

    def encode(self, row: Row) -> Example | BadRow:
        """Tokenize a row, or return it as a bad row with the reason."""
        turns, first = row.fields["turns"], row.fields["first"]
        pictures = [part["image"] for turn in turns for part in _parts(turn) if part["type"] == "image"]
        kept, images = [], []
        for number, picture in enumerate(pictures, 1):
            try:
                kept.append(stored(picture, row.folder))
            except ValueError as error:
                return BadRow(row.place, str(error))
            try:
                self.digest.update(_digest(kept[-1]))
                images.append(opened(kept[-1]))
            except Exception as error:  # a damaged picture may fail anywhere in the library
                name = Path(kept[-1]["path"]).name if kept[-1]["path"] else f"picture {number}"
                return BadRow(row.place, f"{name}: cannot be opened as a picture ({str(error)[:120]})")
        texts = [part.get("text", "") for turn in turns for part in _parts(turn)]
        marks = (TAG, *(getattr(self.processor, name, None) for name in ("image_token", "boi_token")))
        if mark := next((mark for mark in marks if mark and any(mark in text for text in texts)), None):
            return BadRow(row.place, f'contains {mark!r}: write a part {{"type": "image"}} where a picture belongs')
        filled = with_pictures(turns, images)
        parts = {"prompt": filled[:first], "completion": filled[first:]} if first else {"messages": filled}
        example = super().encode(Row(row.place, "prompt and completion" if first else "messages", parts))
        if isinstance(example, BadRow):
            return example
        more = {"turns": json.dumps(with_pictures(turns, [None] * len(pictures))), "pictures": kept, "place": row.place}
        return Example(row.place, example.input_ids, example.labels, more)

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, **settings: Any) -> Any:
        tensors = {"return_tensors": "pt"} if settings["tokenize"] else {}
        made = self.processor.apply_chat_template(messages, chat_template=self.template, **settings, **tensors)
        return {"input_ids": made["input_ids"][0].tolist()} if settings["tokenize"] else made
