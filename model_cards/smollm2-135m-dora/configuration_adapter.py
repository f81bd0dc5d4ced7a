"""What the configurations of MixLoRA and DoRA adapters share: hyper-parameters of the update, and the base it is for.

A configuration names its base (id, revision, fingerprint) and holds the base's own configuration as `text_config`, the
name under which transformers and TRL look for the language model inside a wrapper. Every public attribute that is not
the adapter's is read from there and written there: the base sees what a tool sets on `model.config` (Trainer sets
``use_cache``), and a tool reads the base's values (``num_key_value_heads``).
"""

import dataclasses
import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

FORMAT_VERSION = 4
"""Newest version of the published layout (tensor names and configuration fields). A newer one is refused by name.

1: an adapter in one list of layers. 2: also in several, and with `modules_to_save`. 3: also on stacked experts.
4: also routers of linears, other numbers of experts in other layers, and `base_quantization`.
"""
ONLY_WHERE_SET = ("base_quantization", "modules_to_save", "router_scope", "target_parameters", "towers")
"""Fields that earlier versions do not know: config.json has them only where they are set."""
ABOUT_THE_REPO = {"architectures", "auto_map", "dtype", "name_or_path", "torch_dtype", "transformers_version"}
"""Fields of any configuration that describe the repo: they are the adapter's here, and the base has its own."""


def require(ok: Any, argument: str, value: object, need: str) -> None:
    """Raise a ValueError that says argument, value and need, unless `ok`."""
    if not ok:
        raise ValueError(f"{argument}={value!r}: {need}")


def require_pattern(pattern: Any, argument: str) -> None:
    """Raise a ValueError unless `pattern` is a mapping whose keys are regular expressions."""
    require(isinstance(pattern, dict), argument, pattern, "must be a mapping from names of modules")
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"{argument}: the key {key!r} must be a regular expression ({error})") from None


def is_int(value: Any, minimum: int) -> bool:
    """Whether `value` is an integer of at least `minimum`; True and False do not count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: Any, minimum: float = 0.0, maximum: float = sys.float_info.max) -> bool:
    """Whether `value` is a number from `minimum` to `maximum`; infinity does not count."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value <= maximum


class AdapterConfig(PreTrainedConfig):
    """Fields that MixLoRA and DoRA share.

    Args:
        r: rank of the low-rank update, at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (``/ sqrt(r)`` with `use_rslora`). Default: ``2 * r``.
        lora_dropout: dropout probability on the input of the low-rank path, in training only.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        target_modules: ``"all-linear"`` (every linear in the decoder layers that an adapter has an effect on), or a
            list of module names or path endings such as ``["q_proj", "mlp.down_proj", "layers.3.mlp.up_proj"]``.
        target_parameters: stacked experts of the base that are adapted: endings of parameter names such as
            ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``. Default: all of them if a fresh adapter has
            ``target_modules="all-linear"``, else none. `target_modules` may then be an empty list.
        rank_pattern: ranks that differ from `r`: path ending or regular expression -> rank.
        alpha_pattern: the same for `lora_alpha`.
        modules_to_save: names of modules of the base, such as a head, that are trained and saved whole. Default: those
            that the base's checkpoint lacks.
        towers: which lists of layers are adapted: None for the language model's, or for both parts of an
            encoder-decoder; ``"all"``; or a list of beginnings of their paths, such as ``["vision_model"]``.
        base_model_name_or_path: Hub id, folder or registered alias of the base.
        base_model_revision: revision of the base on the Hub, to which the adapter's `revision=` never applies.
        base_fingerprint: hash of the base's checkpoint files the adapter was trained on, or ``"unknown"``.
        base_quantization: settings of the quantizer of a base whose checkpoint is quantized; no other base is accepted.
        text_config: the base's configuration.
        format_version: version of the published layout.

    Raises:
        ValueError: a field is out of range; the message names it, the value received and what is required.
    """

    sub_configs = {"text_config": AutoConfig}
    text_config: Any = None  # until there is one
    _own_names: ClassVar[frozenset[str]] = frozenset()  # filled in below

    def __init__(
        self,
        r: int = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        target_modules: Any = "all-linear",
        target_parameters: Any = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        modules_to_save: Any = None,
        towers: Any = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_fingerprint: str = "unknown",
        base_quantization: dict[str, Any] | None = None,
        text_config: Any = None,
        format_version: int = 1,
        **kwargs: Any,
    ) -> None:
        self.format_version = format_version
        self._check_version()  # before all else: a newer one may have other fields
        self.r = r
        self.lora_alpha: Any = 2 * r if lora_alpha is None and is_int(r, 1) else lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
            require_pattern(pattern or {}, name)
            setattr(self, name, dict(pattern or {}))
        given = {"modules_to_save": modules_to_save, "target_parameters": target_parameters, "towers": towers}
        for name, value in {"target_modules": target_modules, **given}.items():
            setattr(self, name, sorted(value) if isinstance(value, (set, tuple)) else value)
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_fingerprint = base_fingerprint
        self.base_quantization = base_quantization
        self._refuse_misspelt(kwargs)
        self._check()
        # The word embeddings belong to the base, which ties them itself.
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(**kwargs)
        # Last: the defaults that transformers has set above are not meant for the base.
        self.text_config = _base_config(text_config) if isinstance(text_config, dict) else text_config
        for name in ("_attn_implementation", "_experts_implementation"):  # setting these sets them on text_config
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name))

    def _refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        """Raise on a key that is nearly one of our fields: PreTrainedConfig keeps any key as an attribute, unread."""
        for key in kwargs:
            close = difflib.get_close_matches(key, self._own_fields(), n=1, cutoff=0.8)
            need = f"{type(self).__name__} has no such field; did you mean {''.join(close)!r}?"
            require(not close, key, kwargs[key], need)

    # ---- attributes of the base ----

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init_subclass__(*args, **kwargs)
        cls._own_names = _names_of_the_adapter(cls)

    def _is_own(self, name: str) -> bool:
        """Whether an attribute is the adapter's: one of its fields, a method, or private."""
        return name.startswith("_") or name in self._own_names

    def __getattribute__(self, name: str) -> Any:
        base = super().__getattribute__("__dict__").get("text_config")
        if base is None or name.startswith("_") or name in self._own_names:
            return super().__getattribute__(name)
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "text_config":
            self._move_to(value)
        if self.text_config is None or self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.text_config, name, value)
            self._set_on_base.add(name)

    def __delattr__(self, name: str) -> None:
        if self.text_config is None or self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.text_config, name)
            self._set_on_base.discard(name)

    def _move_to(self, base: Any) -> None:
        """Set on the configuration of a new base what was set here for the base."""
        if base is None:
            self.__dict__["_set_on_base"] = set()
            return
        changes = self.base_changes()
        for name in [name for name in vars(self) if not self._is_own(name)]:
            del self.__dict__[name]
        for name, value in changes.items():
            setattr(base, name, value)
        self.__dict__["_set_on_base"] = set(changes)

    def base_changes(self) -> dict[str, Any]:
        """Return {name: value} of what was set on this configuration for the base."""
        if self.text_config is not None:
            given = {name: getattr(self.text_config, name) for name in sorted(self._set_on_base)}
        else:
            defaults = vars(PreTrainedConfig())
            given = {name: value for name, value in vars(self).items() if not self._is_own(name)}
            given = {name: value for name, value in given.items() if name not in defaults or defaults[name] != value}
        # transformers stores this argument of from_pretrained under a private name.
        return given | ({"output_attentions": True} if self.__dict__.get("_output_attentions") else {})

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the configuration of the base's language model, which is nested in that of a multimodal base."""
        base = self.text_config
        return self if base is None else base.get_text_config(decoder=decoder, encoder=encoder)

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        private = ("_set_on_base", "quantization_config")  # the latter is the base's, under text_config
        return {name: value for name, value in super().to_dict().items() if name not in private}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of config.json: every field of the adapter, also defaults, and nothing of this machine."""
        fields, values = super().to_diff_dict(), self.to_dict()
        fields.update((name, values[name]) for name in self._own_fields() if name in values)
        for name in ("quantization_config", *(name for name in ONLY_WHERE_SET if values.get(name) is None)):
            fields.pop(name, None)
        if self.text_config is not None:
            fields["text_config"] = self.text_config.to_diff_dict()
            # Quantisation is this process's choice, `_name_or_path` may be a local folder, Trainer sets `use_cache` on
            # any model, and the code that `auto_map` names is in the base's repo.
            for name in ("_name_or_path", "auto_map", "quantization_config", "transformers_version", "use_cache"):
                fields["text_config"].pop(name, None)
        return fields

    @classmethod
    def _own_fields(cls) -> set[str]:
        """Return the names of the constructor arguments that are the adapter's, not PreTrainedConfig's."""
        ours = cls.__mro__[: cls.__mro__.index(PreTrainedConfig)]
        made = [vars(ancestor)["__init__"] for ancestor in ours if "__init__" in vars(ancestor)]
        return {name for init in made for name in inspect.signature(init).parameters} - {"self", "kwargs"}

    def _require(self, fits: Callable[[Any], Any], need: str, *names: str) -> None:
        """Raise a ValueError for the first of these fields whose value does not fit."""
        for name in names:
            require(fits(getattr(self, name)), name, getattr(self, name), need)

    def _check_version(self) -> None:
        need = f"this code reads format versions 1 to {FORMAT_VERSION}; update minilora_hub or use the repo's own code"
        self._require(lambda version: is_int(version, 1) and version <= FORMAT_VERSION, need, "format_version")

    def _check(self) -> None:
        self._check_version()
        self._require(lambda r: is_int(r, 1), "the rank must be an integer of at least 1", "r")
        self._require(lambda alpha: is_number(alpha) and alpha > 0, "must be a number above 0", "lora_alpha")
        self._require(lambda p: is_number(p) and p < 1, "must be a probability in [0, 1)", "lora_dropout")
        self._require(lambda flag: isinstance(flag, bool), "must be True or False", "use_rslora", "use_dora")
        need = 'must be "all-linear" or a non-empty list of module names'
        targets = self.target_modules
        fits = targets == "all-linear" or _is_list_of_names(targets) or (targets == [] and self.target_parameters)
        require(fits, "target_modules", targets, need)
        for name, of in (("modules_to_save", "modules"), ("target_parameters", "parameters")):
            need = f"must be None or a list of names of {of}"
            self._require(lambda names: names is None or names == [] or _is_list_of_names(names), need, name)
        self._require(lambda q: q is None or isinstance(q, dict), "must be None or a mapping", "base_quantization")
        need = 'must be None, "all" or a non-empty list of beginnings of paths'
        self._require(lambda towers: towers in (None, "all") or _is_list_of_names(towers), need, "towers")
        for key, rank in self.rank_pattern.items():
            require(is_int(rank, 1), f"rank_pattern[{key!r}]", rank, "the rank must be an integer of at least 1")
        for key, alpha in self.alpha_pattern.items():
            require(is_number(alpha) and alpha > 0, f"alpha_pattern[{key!r}]", alpha, "must be a number above 0")

    def rank_and_scaling(self, path: str, r: int, alpha: float) -> tuple[int, float]:
        """Return rank and scaling of the linear at `path`, after `rank_pattern` and `alpha_pattern`.

        A key matches a path that it equals, or that ends with ``"." + key``; keys are regular expressions, as in PEFT.
        """
        r = _match_pattern(self.rank_pattern, path, r)
        alpha = _match_pattern(self.alpha_pattern, path, alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) and name for name in value)


def _names_of_the_adapter(config_class: Any) -> frozenset[str]:
    """Return the public attributes that are the adapter's: fields and methods, but not what every model has."""
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {name for name in dir(config_class) if not isinstance(inspect.getattr_static(config_class, name), property)}
    return frozenset((names - shared) | config_class._own_fields() | ABOUT_THE_REPO)


AdapterConfig._own_names = _names_of_the_adapter(AdapterConfig)


def _base_config(fields: dict[str, Any]) -> Any:
    """Return the base's configuration; a plain one where transformers does not know its type (remote code)."""
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    known = model_type in CONFIG_MAPPING
    return CONFIG_MAPPING[model_type].from_dict(fields) if known else PreTrainedConfig.from_dict(fields)


def _match_pattern(pattern: dict[str, Any], path: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default
