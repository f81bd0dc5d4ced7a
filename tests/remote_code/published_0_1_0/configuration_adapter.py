"""What the configurations of MixLoRA and DoRA adapters share: hyper-parameters of the update, and which base it is for.

A configuration names its base (id, revision, fingerprint) and carries the base's own configuration as `text_config`,
the name under which transformers and TRL look for the language model inside a wrapper.
"""

import difflib
import inspect
import math
import re
import sys

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

FORMAT_VERSION = 1
"""Version of the published layout (tensor names and configuration fields). A newer one is refused by name."""


def require(ok, argument, value, need):
    """Raise a ValueError that says argument, value and need, unless `ok`."""
    if not ok:
        raise ValueError(f"{argument}={value!r}: {need}")


def require_pattern(pattern, argument):
    """Raise a ValueError unless `pattern` is a mapping whose keys are regular expressions."""
    require(isinstance(pattern, dict), argument, pattern, "must be a mapping from names of modules")
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"{argument}: the key {key!r} must be a regular expression ({error})") from None


def is_int(value, minimum):
    """Whether `value` is an integer of at least `minimum`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value, minimum=0.0, maximum=sys.float_info.max):
    """Whether `value` is a number from `minimum` to `maximum`; infinity is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value <= maximum


class AdapterConfig(PreTrainedConfig):
    """Fields that MixLoRA and DoRA share.

    Args:
        r: rank of the low-rank update, at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with `use_rslora`).
            Default: ``2 * r``.
        lora_dropout: dropout probability on the input of the low-rank path, in training only.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        target_modules: ``"all-linear"`` (every linear in the decoder layers), or a list of module names or path
            endings such as ``["q_proj", "mlp.down_proj"]``.
        rank_pattern: ranks that differ from `r`: path ending or regular expression -> rank.
        alpha_pattern: the same for `lora_alpha`.
        base_model_name_or_path: Hub id, folder or registered alias of the base.
        base_model_revision: revision of the base on the Hub. The adapter's own `revision=` never applies to the base.
        base_fingerprint: hash of the base's checkpoint files the adapter was trained on, or ``"unknown"``.
        text_config: the base's configuration.
        format_version: version of the published layout.

    Raises:
        ValueError: a field is out of range; the message names it, the value received and what is required.
    """

    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        r=16,
        lora_alpha=None,
        lora_dropout=0.0,
        use_rslora=False,
        use_dora=False,
        target_modules="all-linear",
        rank_pattern=None,
        alpha_pattern=None,
        base_model_name_or_path=None,
        base_model_revision=None,
        base_fingerprint="unknown",
        text_config=None,
        format_version=FORMAT_VERSION,
        **kwargs,
    ):
        require(
            is_int(format_version, 1) and format_version <= FORMAT_VERSION,
            "format_version",
            format_version,
            f"this code reads format versions 1 to {FORMAT_VERSION}; update minilora_hub or use the repo's own code",
        )
        self.format_version = format_version
        self.r = r
        self.lora_alpha = 2 * r if lora_alpha is None and is_int(r, 1) else lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.target_modules = sorted(target_modules) if isinstance(target_modules, (set, tuple)) else target_modules
        for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
            require_pattern(pattern or {}, name)
        self.rank_pattern = dict(rank_pattern or {})
        self.alpha_pattern = dict(alpha_pattern or {})
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_fingerprint = base_fingerprint
        self.text_config = _base_config(text_config) if isinstance(text_config, dict) else text_config
        self._refuse_misspelt(kwargs)
        self._check()
        # The word embeddings belong to the base, which ties them itself.
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(tie_word_embeddings=False, **kwargs)

    def _refuse_misspelt(self, kwargs):
        """PreTrainedConfig keeps unknown keys as attributes, so a misspelt field would be ignored in silence."""
        for key in kwargs:
            close = difflib.get_close_matches(key, self._own_fields(), n=1, cutoff=0.8)
            if close:
                raise ValueError(
                    f"{key}={kwargs[key]!r}: {type(self).__name__} has no such field; did you mean {close[0]!r}?"
                )

    # What scripts written for plain models read from `model.config`; everything else is under `text_config`.
    @property
    def vocab_size(self):
        return self.text_config.vocab_size

    @property
    def hidden_size(self):
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self):
        return self.text_config.num_hidden_layers

    @property
    def num_attention_heads(self):
        return self.text_config.num_attention_heads

    @property
    def max_position_embeddings(self):
        return self.text_config.max_position_embeddings

    def to_diff_dict(self):
        """What config.json holds: every field of the adapter, defaults included, and nothing about this machine."""
        fields, values = super().to_diff_dict(), self.to_dict()
        fields.update((name, values[name]) for name in self._own_fields() if name in values)
        fields.pop("use_cache", None)  # Trainer sets it on any model; the base's own counts
        if self.text_config is not None:
            fields["text_config"] = self.text_config.to_diff_dict()
            # How this process holds the base is its own choice, and `_name_or_path` may be a local folder.
            for runtime_only in ("_name_or_path", "quantization_config", "transformers_version"):
                fields["text_config"].pop(runtime_only, None)
        return fields

    @classmethod
    def _own_fields(cls):
        """Names of the constructor arguments that are the adapter's, not PreTrainedConfig's."""
        own = set()
        for ancestor in cls.__mro__[: cls.__mro__.index(PreTrainedConfig)]:
            if "__init__" in vars(ancestor):
                own.update(inspect.signature(ancestor.__init__).parameters)
        return own - {"self", "kwargs"}

    def _check(self):
        require(is_int(self.r, 1), "r", self.r, "the rank must be an integer of at least 1")
        require(
            is_number(self.lora_alpha) and self.lora_alpha > 0,
            "lora_alpha",
            self.lora_alpha,
            "must be a number above 0",
        )
        require(
            is_number(self.lora_dropout) and self.lora_dropout < 1,
            "lora_dropout",
            self.lora_dropout,
            "must be a probability in [0, 1)",
        )
        for flag in ("use_rslora", "use_dora"):
            require(isinstance(getattr(self, flag), bool), flag, getattr(self, flag), "must be True or False")
        targets = self.target_modules
        require(
            targets == "all-linear"
            or (isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets)),
            "target_modules",
            targets,
            'must be "all-linear" or a non-empty list of module names',
        )
        for key, rank in self.rank_pattern.items():
            require(is_int(rank, 1), f"rank_pattern[{key!r}]", rank, "the rank must be an integer of at least 1")
        for key, alpha in self.alpha_pattern.items():
            require(is_number(alpha) and alpha > 0, f"alpha_pattern[{key!r}]", alpha, "must be a number above 0")

    def rank_and_scaling(self, path, r, alpha):
        """Rank and scaling of the linear at `path`, after `rank_pattern` and `alpha_pattern`.

        A key matches a path that it equals, or that ends with ``"." + key``; keys are regular expressions, as in PEFT.
        """
        r = _match_pattern(self.rank_pattern, path, r)
        alpha = _match_pattern(self.alpha_pattern, path, alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def _base_config(fields):
    """The base's configuration from its dict; a plain one where transformers does not know the type (remote code)."""
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    return PreTrainedConfig.from_dict(fields)


def _match_pattern(pattern, path, default):
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default
