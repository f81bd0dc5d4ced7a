"""Frozen dataclasses that are JSON files: read strictly, validated, written whole or not at all.

A field that is missing, misspelt, of another type or out of range is an error that names the file, the field, its value
and what is needed. A dataclass states its fields' types; what a type cannot say goes into its method `_check(require)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from minilora_hub.errors import AdapterError

Scalar = str | int | float | bool
KINDS = {str: "must be a text", int: "must be a whole number", float: "must be a number", bool: "must be true or false"}
Require = Callable[[bool, str, str], None]
"""Called with whether something holds, the field's name, and what is needed."""


class Document:
    """A JSON file with a `schema_version`: load, validate, save.

    Attributes:
        FILE: its usual name.
        VERSION: the newest version of its schema, which is written. Older ones are read: a version only adds fields.
    """

    FILE: ClassVar[str]
    VERSION: ClassVar[int]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file, or the one of the usual name in a folder.

        Raises:
            AdapterError: it is missing, is no JSON, is of a newer schema, or a field is wrong.
        """
        file = Path(path)
        file = file / cls.FILE if file.is_dir() else file
        try:
            content = strict_json(file.read_bytes())
        except FileNotFoundError:
            raise AdapterError(f"{file.parent.name}: no {file.name}") from None
        except (OSError, ValueError) as error:
            raise AdapterError(f"{file.name} cannot be read: {error}") from error
        return cls.from_dict(content, file.name)

    @classmethod
    def from_dict(cls, content: Any, file: str | None = None) -> Self:
        """Build it from parsed JSON; `file` is the name that errors say."""
        file = file or cls.FILE
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > cls.VERSION:
            raise AdapterError(
                f"{file}: schema_version={version}: this minilora_hub reads versions 1 to {cls.VERSION}; update it"
            )
        if version in range(1, cls.VERSION) and not isinstance(version, bool):
            content = content | {"schema_version": cls.VERSION}
        decoded: Self = _decode(cls, content, file, "")
        return decoded

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds: the schema's version, then the fields in their order."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"schema_version": fields.pop("schema_version"), **fields}

    def validate(self) -> None:
        """Raise AdapterError if a field has a wrong type or value."""
        self._validate(self.to_dict())

    def _validate(self, content: dict[str, Any]) -> None:
        # Through JSON, where tuples are lists, and where what no file can hold (NaN) is refused.
        try:
            self.from_dict(json.loads(json.dumps(content, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{self.FILE} cannot be written: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file into a folder, whole or not at all.

        Raises:
            AdapterError: a field has a wrong type or value; nothing is written then.
        """
        content = self.to_dict()
        self._validate(content)
        path = Path(folder) / self.FILE
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
            temporary.write_text(_pack_number_lists(text) + "\n", encoding="utf-8", newline="\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def strict_json(data: bytes | str) -> Any:
    """Parse JSON, refusing what parsers disagree about: duplicate keys, NaN and infinities, a byte-order mark.

    Raises:
        ValueError: the text is no such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
        if twice:
            raise ValueError(f"the key {twice[0]!r} occurs twice in one object")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number in JSON")

    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _pack_number_lists(text: str) -> str:
    """Put lists of numbers on one line each: a loss curve is otherwise four lines a point."""
    number_list = re.compile(r"\[\s*((?:-?[\d.eE+-]+,\s*)*-?[\d.eE+-]+)\s*\](?=,?\n)")
    return number_list.sub(lambda found: "[" + ", ".join(found[1].replace(",", " ").split()) + "]", text)


def _decode(kind: Any, value: Any, file: str, path: str) -> Any:
    """Build a value of the annotated type `kind` from JSON, or raise an error that names the field at `path`."""

    def fail(need: str) -> AdapterError:
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        return AdapterError(f"{file}: {path or 'its content'}={shown}: {need}")

    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, file, path, fail)
    origin, arguments = _origin_and_arguments(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [member for member in arguments if member is not type(None)]
        if len(members) == 1:
            return _decode(members[0], value, file, path)
        if not isinstance(value, tuple(members)) or (isinstance(value, float) and not math.isfinite(value)):
            raise fail("must be a text, a finite number, true or false")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise fail("must be a list" + ("" if arguments[-1] is ... else f" of {len(arguments)}"))
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        pairs = zip(kinds, value, strict=True)
        return tuple(_decode(inner, item, file, f"{path}[{i}]") for i, (inner, item) in enumerate(pairs))
    if origin is dict:
        if not isinstance(value, dict):
            raise fail("must be an object")
        return {key: _decode(arguments[1], item, file, f"{path}[{key!r}]") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise fail(KINDS[kind])
    if kind is float and not math.isfinite(value):
        raise fail("must be finite")
    return value


@cache
def _origin_and_arguments(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


@cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _decode_fields(kind: Any, value: Any, file: str, path: str, fail: Callable[[str], AdapterError]) -> Any:
    if not isinstance(value, dict):
        raise fail("must be an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{path}." if path else ""
    for name in value.keys() - fields.keys():
        close = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"its fields are {sorted(fields)}"
        raise AdapterError(f"{file}: {prefix}{name}: there is no such field; {hint}")
    # A file says which schema it follows; only in Python does the field have a default.
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    for name in sorted((required | ({"schema_version"} & fields.keys())) - value.keys()):
        raise AdapterError(f"{file}: {prefix}{name} is missing")
    hints = _types_of(kind)
    decoded = kind(**{name: _decode(hints[name], item, file, prefix + name) for name, item in value.items()})

    def require(holds: bool, name: str, need: str) -> None:
        if not holds:
            shown = getattr(decoded, name, None) if name in fields else value.get(name.partition("[")[0])
            raise AdapterError(f"{file}: {prefix}{name}={str(shown)[:80]!r}: {need}")

    decoded._check(require)
    return decoded
