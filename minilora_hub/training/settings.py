"""The settings of a training run: method, base, data and recipe, from defaults, a YAML file and overrides.

All settings are saved with the result as ``training.yaml``, from which the run can be repeated. Torch is not imported.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from minilora_hub.bases.resolving import EMBEDDED, is_path
from minilora_hub.documents import write_whole
from minilora_hub.errors import TrainingError
from minilora_hub.training.objective_specs import parse_objectives
from minilora_hub.training.recipes import OURS, RECIPES, Flag, Recipe, Text, Texts, adapter_field_names, plain_value
from minilora_hub.training.sources import is_file

SETTINGS_FILE = "training.yaml"
REPORTERS = ("trackio", "tensorboard", "wandb")
NEEDS = {
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "too_short": "is empty: leave it out for the default",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
    "literal_error": "must be one of {expected}",
    "value_error": "{error}",
}
"""The requirement to report, by the type of pydantic's error; all other types are invalid numbers."""


@dataclass(frozen=True)
class TrainingSettings:
    """Method, base, data and recipe of a training run.

    Attributes:
        method: a name in `RECIPES`.
        base: ``"embedded"``, a folder or a Hub id.
        data: files (``.jsonl``, ``.csv``, ``.parquet``, ``.txt``, ``.md``), or one data set's id on the Hub.
        recipe: settings of the training.
        base_revision: branch, tag or commit of a base on the Hub.
        data_split: split of a Hub data set.
        data_revision: its branch, tag or commit.
        from_votes: a file of votes with the answers' texts, instead of data; see `votes`.
        validation_data: files to validate on, instead of held-out rows.
        skip_bad_rows: skip and count invalid rows.
        license: of the adapter, for its card.
        language: codes of its languages, for its card.
        about_data: description of the data, for the card.
        task: ``"text-generation"``, ``"image-text-to-text"``, ``"text-classification"`` or ``"token-classification"``;
            default: by the rows.
        from_adapter: the adapter to continue from: a folder or a Hub id.
        from_revision: its revision on the Hub; the commit once the run has begun.
        learn: which part of that adapter is trained.
        objective: terms added to the loss, ``NAME:key=value,…``; see `objective_specs`.
        keep: LoRA adapters that stay active under the new one, which is saved together with them.
        exact_base: what a quantized base was made of, for `recipe.init`. Default: what its config.json names.
    """

    method: str
    base: Text
    data: Texts
    recipe: Recipe
    base_revision: Text | None = None
    from_adapter: Text | None = None
    from_revision: Text | None = None
    learn: Literal["all", "router", "experts", "attention"] = "all"
    objective: Texts = ()
    keep: Texts = ()
    exact_base: Text | None = None
    data_split: Text = "train"
    data_revision: Text | None = None
    from_votes: Text | None = None
    validation_data: Texts = ()
    skip_bad_rows: Flag = False
    license: Text | None = None
    language: Texts = ()
    about_data: Text | None = None
    task: Literal["text-generation", "text-classification", "token-classification", "image-text-to-text"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a flat mapping, as in the YAML file: the recipe's fields beside the others."""
        fields = dataclasses.asdict(self)
        fields |= fields.pop("recipe")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def save(self, folder: Path) -> None:
        """Write all settings to ``training.yaml``."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        write_whole(folder / SETTINGS_FILE, text)


OWN_FIELDS = tuple(f.name for f in dataclasses.fields(TrainingSettings) if f.name != "recipe")
RECIPE_FIELDS = tuple(f.name for f in dataclasses.fields(Recipe))


def make_settings(*sources: Mapping[str, Any]) -> TrainingSettings:
    """Build settings from the method's defaults and overrides; a later source overrides an earlier one.

    Args:
        *sources: {name: value}, where a name is a field of `TrainingSettings` or `Recipe`, or of the method's own
            configuration; ``"adapter"`` may hold a mapping of the latter. None means "not given".

    Raises:
        TrainingError: a name is unknown, or a value has a wrong type or is out of range; the message names both.
    """
    given: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    for source in sources:
        values = {name.replace("-", "_"): value for name, value in source.items() if value is not None}
        nested = values.pop("adapter", {})
        if not isinstance(nested, Mapping):
            raise TrainingError(f"adapter={nested!r}: must be a mapping of the method's own fields")
        adapter |= nested
        for name, value in values.items():
            (given if name in OWN_FIELDS or name in RECIPE_FIELDS else adapter)[name] = value
    method = given.get("method")
    if method not in RECIPES:
        raise TrainingError(f"method={method!r}: must be one of {', '.join(RECIPES)}")
    if given.get("from_votes"):
        if given.get("data"):
            raise TrainingError(
                f"from_votes={given['from_votes']!r}: goes without data={given['data']!r}: leave one out"
            )
        given["data"] = ()
    for name in ("base", "data"):
        if not given.get(name) and not (name == "data" and given.get("from_votes")):
            raise TrainingError(f"{name} is missing: pass --{name}")
    defaults = RECIPES[method]
    chosen = defaults["adapter"] | {name: plain_value(value) for name, value in adapter.items()}
    if method in OURS and "lora_alpha" not in adapter and isinstance(chosen.get("r"), int):
        chosen["lora_alpha"] = 2 * chosen["r"]
    if chosen.get("r") == "auto" and "lora_alpha" not in adapter:
        del chosen["lora_alpha"]  # follows from the ranks
    _check_adapter_fields(method, chosen)
    recipe = defaults | {name: value for name, value in given.items() if name in RECIPE_FIELDS} | {"adapter": chosen}
    own = {name: value for name, value in given.items() if name in OWN_FIELDS}
    try:
        settings = TypeAdapter(TrainingSettings).validate_python(own | {"recipe": recipe})
    except ValidationError as error:
        problem = error.errors()[0]
        name = next(step for step in reversed(problem["loc"]) if step in OWN_FIELDS or step in RECIPE_FIELDS)
        number = "must be a whole number" if problem["type"].startswith("int") else "must be a number"
        need = NEEDS.get(problem["type"], number).format(**problem.get("ctx", {}))
        if problem["type"] == "literal_error":
            need = need.replace("'", "").replace(" or ", ", ")
        raise TrainingError(f"{name}={problem['input']!r}: {need}") from None
    if settings.from_votes and "dpo" not in {spec.name for spec in parse_objectives(settings.objective)}:
        settings = dataclasses.replace(settings, objective=(*settings.objective, "dpo"))
    _check_combinations(settings)
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of overrides.

    Raises:
        TrainingError: it is missing, not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainingError(f"config {str(path)!r}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"config {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"config {str(path)!r} must be a mapping with one setting per line: name: value")
    return content


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse ``"num_experts=4"`` into a name and a value; values are written as in YAML, e.g. ``[q_proj, v_proj]``."""
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


def _check_adapter_fields(method: str, chosen: Mapping[str, Any]) -> None:
    known = adapter_field_names(method, chosen)
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(name, [*RECIPE_FIELDS, *OWN_FIELDS, *known], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TrainingError(f"{name}={chosen[name]!r}: neither a training setting nor a field of {method}{hint}")


def _check_combinations(settings: TrainingSettings) -> None:
    recipe = settings.recipe

    def require(holds: bool, name: str, need: str) -> None:
        if not holds:
            raise TrainingError(f"{name}={getattr(recipe, name)!r}: {need}")

    def require_of_run(holds: bool, name: str, need: str) -> None:
        if not holds:
            raise TrainingError(f"{name}={getattr(settings, name)!r}: {need}")

    own = settings.method in OURS
    require_of_run(settings.learn == "all" or bool(settings.from_adapter), "learn", "needs --from ADAPTER")
    require_of_run(own or not settings.from_adapter, "from_adapter", f"needs one of the methods {', '.join(OURS)}")
    require_of_run(own or not settings.from_votes, "from_votes", f"needs one of the methods {', '.join(OURS)}")
    require_of_run(own or not settings.objective, "objective", f"needs one of the methods {', '.join(OURS)}")
    objectives = {spec.name for spec in parse_objectives(settings.objective)}
    mixture = settings.method in ("mixlora", "mixdora")
    require_of_run(mixture or settings.learn not in ("router", "experts"), "learn", "needs a mixture")
    routers = mixture and settings.learn in ("all", "router")
    require(routers or recipe.router_lr_ratio is None, "router_lr_ratio", "needs a mixture whose routers learn")
    require(recipe.loraplus_ratio is None or settings.learn != "router", "loraplus_ratio", "routers have no A and B")
    require_of_run(not settings.keep or settings.method == "lora", "keep", "needs --method lora")
    require_of_run("orthogonal" not in objectives or bool(settings.keep), "objective", "orthogonal needs --keep")
    require_of_run("dpo" not in objectives or bool(settings.from_votes), "objective", "dpo needs --from-votes")
    if settings.from_votes:
        require_of_run(settings.task in (None, "text-generation"), "task", "goes without --from-votes")
        require(recipe.batching != "packed", "batching", "with --from-votes: must be shuffled or length-grouped")
        require(recipe.loss_on == "completions", "loss_on", "with --from-votes: must be completions")
    require(own or recipe.save_dtype == "float32", "save_dtype", f"needs one of the methods {', '.join(OURS)}")
    if str(recipe.adapter.get("peft_type")).upper() == "ADALORA" and "r" in recipe.adapter:
        raise TrainingError(f"r={recipe.adapter['r']!r}: AdaLoRA prunes from init_r to target_r: pass these (--set)")
    automatic = recipe.adapter.get("r") == "auto"
    if automatic and recipe.budget is None:
        raise TrainingError("r='auto': needs --budget PARAMETERS")
    require(automatic or recipe.budget is None, "budget", "needs --rank auto")
    if automatic:
        plain = settings.method in ("lora", "dora") and not (settings.from_adapter or settings.keep)
        require(plain, "budget", "needs --method lora or dora, without --from and --keep")
        for name in ("lora_alpha", "rank_pattern", "alpha_pattern"):
            if name in recipe.adapter:
                raise TrainingError(f"{name}={recipe.adapter[name]!r}: follows from --rank auto; leave it out")
    started = recipe.init != "zero"
    require_of_run(started or not settings.exact_base, "exact_base", "needs --init loftq or calibrated")
    fresh = own and not (settings.from_adapter or settings.keep or automatic)
    require(
        fresh or not started, "init", f"needs one of the methods {', '.join(OURS)}, without --from, --keep, --budget"
    )
    need = "the adapter must name the quantized base: write it with minilora quantize, and pass it as --base"
    require(not (started and recipe.quantize), "init", f"with --quantize {recipe.quantize}: {need}")
    routing = recipe.adapter.get("routing_strategy", "top_k")
    require(not started or routing == "top_k", "init", f"needs weights that sum to one: not {routing} routing")
    scope = recipe.adapter.get("router_scope")
    require(not started or scope is None, "init", f"needs routers of blocks: leave out router_scope={scope!r}")
    from_hub = not all(is_file(source) for source in (*settings.data, *settings.validation_data))
    require_of_run(from_hub or settings.data_split == "train", "data_split", "needs a data set on the Hub")
    require_of_run(from_hub or settings.data_revision is None, "data_revision", "needs a data set on the Hub")
    base_from_hub = settings.base != EMBEDDED and not is_path(settings.base)
    require_of_run(base_from_hub or settings.base_revision is None, "base_revision", "needs a base on the Hub")
    alone = not settings.keep or (objectives <= {"orthogonal"} and not settings.from_adapter)
    require_of_run(alone, "keep", "goes with no objective but orthogonal, and not with --from")
    micro = recipe.micro_batch_size
    require(micro is None or recipe.batch_size % micro == 0, "micro_batch_size", "must divide batch_size")
    validated = bool(settings.validation_data) or recipe.validation > 0
    require(not (settings.validation_data and recipe.validation), "validation", "goes without --validation-data")
    require(recipe.early_stopping is None or validated, "early_stopping", "needs --validation or --validation-data")
    for name in recipe.report_to:
        require(name in REPORTERS, "report_to", f"{name!r} is unknown; known are {', '.join(REPORTERS)}")
    if settings.method == "loftq":
        require(recipe.quantize == "nf4", "quantize", "LoftQ needs an NF4 base: leave it out, or pass nf4")
    if settings.method == "pissa":
        require(recipe.quantize is None, "quantize", "PiSSA changes the base's weights: train it on an unquantised one")
