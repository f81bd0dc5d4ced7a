"""JSON files as frozen dataclasses: read strictly, validated by pydantic, written whole or not at all.

A field that is missing, unknown, of another type or out of range is an error that names the file, the field, its value
and what is needed. A dataclass states its fields' types; what a type cannot say is a `need` on it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, ValidationInfo

from minilora_hub.errors import AdapterError


def need(message: str, holds: Callable[[Any, dict[str, Any]], bool]) -> AfterValidator:
    """Require of a field what its type cannot say.

    Args:
        message: what is needed.
        holds: called with the field's value and the fields before it.
    """

    def check(value: Any, info: ValidationInfo) -> Any:
        if not holds(value, info.data):
            raise ValueError(message)
        return value

    return AfterValidator(check)


def _require_scalar(value: Any) -> Any:
    if not isinstance(value, (str, int, float)):
        raise ValueError("must be a text, a number, true or false")
    return value


Scalar = Annotated[str | int | float | bool, BeforeValidator(_require_scalar)]


class Document:
    """A JSON file with a `schema_version`: load, validate, save.

    Attributes:
        FILE: its usual name.
        VERSION: the newest version of its schema, which is written. Older ones are read: a version only adds fields.
    """

    FILE: ClassVar[str]
    VERSION: ClassVar[int]
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

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
        """Build it from parsed JSON; `file` is the name that errors say.

        Raises:
            AdapterError: it is of a newer schema, or a field is wrong.
        """
        file = file or cls.FILE
        if isinstance(content, dict):
            if "schema_version" not in content:
                raise AdapterError(f"{file}: schema_version is missing")
            version = content["schema_version"]
            if type(version) is not int or version < 1:
                raise AdapterError(f"{file}: schema_version={version!r}: must be 1 to {cls.VERSION}")
            if version > cls.VERSION:
                raise AdapterError(
                    f"{file}: schema_version={version}: this minilora_hub reads versions 1 to {cls.VERSION}; update it"
                )
            content = content | {"schema_version": cls.VERSION}
        try:
            # As JSON, in which a tuple is a list. A lone surrogate, which no file can hold, becomes a question mark.
            text = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
            document: Self = _adapter(cls).validate_json(text)  # type: ignore[arg-type]
        except ValidationError as error:
            raise AdapterError(f"{file}: {_first_problem(cls, error)}") from None
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{file} cannot be written as JSON: {error}") from error
        return document

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds: the schema's version, then the fields in their order."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"schema_version": fields.pop("schema_version"), **fields}

    def validate(self) -> None:
        """Raise AdapterError if a field has a wrong type or value."""
        self.from_dict(self.to_dict())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file into a folder, whole or not at all.

        Raises:
            AdapterError: a field has a wrong type or value; nothing is written then.
        """
        self.validate()
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        return write_whole(Path(folder) / self.FILE, _pack_number_lists(text) + "\n")


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file so that readers find the old content or the new one, even after a crash; return its path.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
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


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_problem(kind: Any, error: ValidationError) -> str:
    """Say in one line which field is wrong, its value, and what is needed; an unknown field comes first."""
    problem = min(error.errors(include_url=False), key=lambda found: found["type"] != "unexpected_keyword_argument")
    place = "".join(f".{step}" if str(step).isidentifier() else f"[{step!r}]" for step in problem["loc"]).lstrip(".")
    if problem["type"] == "missing":
        return f"{place} is missing"
    if problem["type"] == "unexpected_keyword_argument":
        schema = _adapter(kind).json_schema()
        known = {name for part in (schema, *schema.get("$defs", {}).values()) for name in part.get("properties", ())}
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        return f"{place}: there is no such field" + (f"; did you mean {close[0]!r}?" if close else "")
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{place or 'its content'}={shown}: {problem['msg'].removeprefix('Value error, ').removeprefix('Input ')}"
