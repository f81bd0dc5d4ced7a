"""What one training run does: method, base, data and recipe; put together from defaults, a YAML file and overrides.

`TrainingSettings` is also what lies beside the result as ``training.yaml``, complete, so that the same run can be made
again from it. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minilora_hub.documents import write_whole
from minilora_hub.errors import TrainingError
from minilora_hub.training.recipes import OURS, RECIPES, Recipe

SETTINGS_FILE = "training.yaml"
REPORTERS = ("trackio", "tensorboard", "wandb")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class TrainingSettings:
    """What is trained on what.

    Attributes:
        method: a name in `RECIPES`.
        base: ``"embedded"``, a folder or a Hub id.
        data: files (``.jsonl``, ``.csv``, ``.parquet``), or one data set's id on the Hub.
        recipe: how.
        base_revision: branch, tag or commit of a base on the Hub.
        data_split: split of a Hub data set.
        data_revision: its branch, tag or commit.
        validation_data: files to validate on, instead of held-out rows.
        skip_bad_rows: leave unusable rows out, and count them.
        license: of the adapter, for its card.
        language: codes of its languages, for its card.
        about_data: what the data is, for the card.
    """

    method: str
    base: str
    data: tuple[str, ...]
    recipe: Recipe
    base_revision: str | None = None
    data_split: str = "train"
    data_revision: str | None = None
    validation_data: tuple[str, ...] = ()
    skip_bad_rows: bool = False
    license: str | None = None
    language: tuple[str, ...] = ()
    about_data: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields flat, as the YAML file has them: the recipe's beside the run's own."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "recipe"}
        recipe = {f.name: getattr(self.recipe, f.name) for f in dataclasses.fields(self.recipe)}
        merged = own | recipe | {"adapter": dict(self.recipe.adapter)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in merged.items()}

    def save(self, folder: Path) -> None:
        """Write ``training.yaml``, complete."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        write_whole(folder / SETTINGS_FILE, text)


OWN_FIELDS = tuple(f.name for f in dataclasses.fields(TrainingSettings) if f.name != "recipe")
RECIPE_FIELDS = tuple(f.name for f in dataclasses.fields(Recipe))


def make_settings(*sources: Mapping[str, Any]) -> TrainingSettings:
    """Settings from the method's defaults and overrides, a later source before an earlier one.

    Args:
        *sources: {name: value}, where a name is a field of `TrainingSettings` or `Recipe`, or of the method's own
            configuration; ``"adapter"`` may hold a mapping of the latter. None means "not said".

    Raises:
        TrainingError: a name is unknown, or a value has a wrong type or is out of range; the message names both.
    """
    said: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    for source in sources:
        values = {name.replace("-", "_"): value for name, value in source.items() if value is not None}
        nested = values.pop("adapter", {})
        if not isinstance(nested, Mapping):
            raise TrainingError(f"adapter={nested!r}: must be a mapping of the method's own fields")
        adapter |= nested
        for name, value in values.items():
            (said if name in OWN_FIELDS or name in RECIPE_FIELDS else adapter)[name] = value
    method = said.get("method")
    if method not in RECIPES:
        raise TrainingError(f"method={method!r}: must be one of {', '.join(RECIPES)}")
    for name in ("base", "data"):
        if not said.get(name):
            raise TrainingError(f"{name} is missing: pass --{name}")
    recipe_class = RECIPES[method]
    default = recipe_class()
    chosen = dict(default.adapter) | {name: _plain(value) for name, value in adapter.items()}
    if method in OURS and "lora_alpha" not in adapter and isinstance(chosen.get("r"), int):
        chosen["lora_alpha"] = 2 * chosen["r"]
    _check_adapter_fields(method, chosen)
    recipe = recipe_class(**_typed(recipe_class, {k: v for k, v in said.items() if k in RECIPE_FIELDS}), adapter=chosen)
    settings = TrainingSettings(
        **_typed(TrainingSettings, {k: v for k, v in said.items() if k in OWN_FIELDS}), recipe=recipe
    )
    _check_ranges(settings)
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of overrides.

    Raises:
        TrainingError: it is missing, no YAML, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainingError(f"config {str(path)!r}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"config {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"config {str(path)!r} must hold names and values, one a line: name: value")
    return content


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"num_experts=4"`` as a name and a value; values are written as in YAML, e.g. ``[q_proj, v_proj]``."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise TrainingError(f"--set {text!r}: must be NAME=VALUE, e.g. --set num_experts=4")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise TrainingError(f"--set {text!r}: the value cannot be read ({error})") from error
    if parsed is None:
        raise TrainingError(f"--set {text!r}: has no value: leave it out for the default")
    return name.strip().replace("-", "_"), parsed


def _plain(value: Any) -> Any:
    """A number that YAML 1.1 takes for text (``1e-4`` has no dot) as a number."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    return list(value) if isinstance(value, tuple) else value


def _typed(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {name: _convert(name, hints[name], value) for name, value in values.items()}


def _convert(name: str, kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (member for member in arguments if member is not type(None))
        return _convert(name, kind, value)
    if origin is Literal:
        if value not in arguments:
            raise TrainingError(f"{name}={value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(items, (list, tuple)):
            raise TrainingError(f"{name}={value!r}: must be a list of texts")
        if "" in items:
            raise TrainingError(f"{name}={value!r}: holds an empty text: leave it out")
        return tuple(str(item) for item in items)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    value = _plain(value) if kind in (int, float) else value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if value == "" and kind is str:
        raise TrainingError(f"{name}='': is empty: leave it out for the default")
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        need = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise TrainingError(f"{name}={value!r}: must be {need}")
    return value


def adapter_field_names(method: str, chosen: Mapping[str, Any]) -> set[str]:
    """Names of the fields of a method's configuration; ours are read from the class, so a new one needs no list."""
    if method in ("mixlora", "mixdora", "dora", "lora"):
        from minilora_hub.remote_code.configuration_minilora import AdapterConfig, DoraConfig, MixLoraConfig

        config: Any = {"dora": DoraConfig, "lora": AdapterConfig}.get(method, MixLoraConfig)
        given = {"base_model_name_or_path", "base_model_revision", "base_fingerprint", "text_config", "format_version"}
        return set(config._own_fields()) - given - (set() if method in ("mixlora", "mixdora") else {"use_dora"})
    from minilora_hub.training.peft_configs import config_fields

    return config_fields(chosen)


def _check_adapter_fields(method: str, chosen: Mapping[str, Any]) -> None:
    known = adapter_field_names(method, chosen)
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(name, [*RECIPE_FIELDS, *OWN_FIELDS, *known], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TrainingError(f"{name}={chosen[name]!r}: neither a training setting nor a field of {method}{hint}")


def _check_ranges(settings: TrainingSettings) -> None:
    recipe = settings.recipe

    def require(holds: bool, name: str, need: str) -> None:
        if not holds:
            raise TrainingError(f"{name}={getattr(recipe, name)!r}: {need}")

    require(recipe.learning_rate > 0, "learning_rate", "must be above 0")
    require(recipe.epochs > 0, "epochs", "must be above 0")
    for name in ("max_steps", "micro_batch_size", "max_length", "save_every", "early_stopping"):
        value = getattr(recipe, name)
        require(value is None or value >= 1, name, "must be at least 1")
    for name in ("batch_size", "keep_checkpoints"):
        require(getattr(recipe, name) >= 1, name, "must be at least 1")
    require(0 <= recipe.warmup < 1, "warmup", "must be a share of the steps, at least 0 and below 1")
    require(0 <= recipe.validation < 1, "validation", "must be a share of the rows, at least 0 and below 1")
    require(recipe.loraplus_ratio is None or recipe.loraplus_ratio >= 1, "loraplus_ratio", "must be at least 1")
    require(recipe.weight_decay >= 0, "weight_decay", "must be at least 0")
    require(recipe.max_grad_norm >= 0, "max_grad_norm", "must be at least 0")
    require(0 <= recipe.seed < 2**32, "seed", "must be at least 0 and below 2**32")
    micro = recipe.micro_batch_size
    require(micro is None or recipe.batch_size % micro == 0, "micro_batch_size", "must divide batch_size")
    validated = bool(settings.validation_data) or recipe.validation > 0
    require(recipe.early_stopping is None or validated, "early_stopping", "needs --validation or --validation-data")
    for name in recipe.report_to:
        require(name in REPORTERS, "report_to", f"{name!r} is unknown; known are {', '.join(REPORTERS)}")
    if settings.method == "loftq":
        require(recipe.quantize == "nf4", "quantize", "LoftQ is for an NF4 base: leave it out, or pass nf4")
    if settings.method == "pissa":
        require(recipe.quantize is None, "quantize", "PiSSA changes the base's weights: train it on an unquantised one")
