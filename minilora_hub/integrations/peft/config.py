"""`MixLoraPeftConfig`: the configuration of a MixLoRA as a PEFT method, and its translation to a MixLoraConfig.

``adapter_config.json`` keeps the keys of the reference (`mixlora` 0.2.3 and `moe_peft` 2.0.2). A few have other names
in MixLoraConfig: transformers copies a field called ``top_k`` or ``temperature`` into the generation settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType

from minilora_hub.adapter_folder.names import STRATEGIES
from minilora_hub.remote_code.configuration_minilora import AdapterConfig, MixLoraConfig

MIXLORA = "MIXLORA"
"""The method's name in PEFT. `method.register` makes it known there."""

ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
SAME_FIELDS = (*ADAPTER_FIELDS, "num_experts", "base_fingerprint")
"""Fields that have the same name in a MixLoraConfig."""
FIELD_NAMES = {
    "top_k": "num_experts_per_tok",
    "top_p": "router_top_p",
    "temperature": "router_temperature",
    "jitter_noise": "router_jitter_noise",
    "sparse_step": "router_sparse_step",
    "ffn_dropout": "expert_dropout",
    "expert_capacity": "expert_capacity",
    "router_z_loss_coef": "router_z_loss_coef",
    "router_init_range": "router_init_range",
}
"""Routing fields in ``adapter_config.json`` -> in a MixLoraConfig."""

EXPERT_KEYS = ("r", "lora_alpha", "lora_dropout")
REFERENCE_EXPERT_KEYS = {"bias", "task_type", "base_model_name_or_path", "peft_type", "use_dora", "use_rslora"}


@dataclass
class MixLoraPeftConfig(PeftConfig):
    """Configuration of a MixLoRA (arXiv 2404.15159) as a PEFT method: ``get_peft_model(model, MixLoraPeftConfig())``.

    Attributes:
        r: rank of the LoRA outside the mixtures (on attention), at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r``. Default: ``2 * r``.
        lora_dropout: dropout probability on the input of the low-rank path, in training only.
        expert_lora: overrides for the experts: ``{"r": …, "lora_alpha": …, "lora_dropout": …}``. Default: none.
        num_experts: LoRA experts per feed-forward block.
        routing_strategy: ``"mixlora"`` (top-k), ``"mixlora-dynamic"`` (top-p) or ``"mixlora-switch"`` (top-1 with
            capacity and z-loss); also under our names ``"top_k"``, ``"top_p"`` and ``"switch"``.
        top_k: experts per token (``"mixlora"``). Default: 2.
        top_p: threshold (``"mixlora-dynamic"``).
        temperature: divides the probabilities (``"mixlora-dynamic"``).
        expert_capacity: tokens of a sequence that one expert serves in training (``"mixlora-switch"``).
        router_z_loss_coef: weight of the z-loss in training (``"mixlora-switch"``).
        sparse_step: one layer in this many is a mixture (``"mixlora-switch"``).
        ffn_dropout: dropout probability on the output of a mixture, in training only.
        jitter_noise: in training, the router's input is multiplied by U(1 - noise, 1 + noise).
        router_init_range: standard deviation of a fresh router.
        router_aux_loss_coef: weight of the load-balance loss in training. 0: none.
        router_loss: False turns off all router losses.
        target_modules: names, path endings or a regular expression, as in PEFT; a feed-forward block's name stands for
            all its projections. Default: ``"all-linear"``, every linear in the decoder layers.
        exclude_modules: modules to exclude from `target_modules`, in the same formats.
        layers_to_transform: index or indices of the layers to adapt. Default: all.
        layers_pattern: name of the list of layers that `layers_to_transform` indexes.
        rank_pattern: ranks that differ: path ending or regular expression -> rank.
        alpha_pattern: the same for `lora_alpha`.
        use_rslora: rank-stabilised scaling, ``lora_alpha / sqrt(r)``.
        use_dora: DoRA on attention and experts alike ("MixDoRA").
        modules_to_save: modules that are fully trained and saved with the adapter, as in PEFT.
        trainable_token_indices: rows of the embedding that are trained, as in PEFT.
        init_lora_weights: True: the output is the base's until the adapter is trained. False: random, for tests.
        bias: only ``"none"``.
        act_fn: the reference's name of the activation, which is the base's own anyway; only None or the base's.
        base_fingerprint: hash of the base's checkpoint files the adapter was trained on, or ``"unknown"``.

    Raises:
        ValueError: a field is out of range; the message names it, the value received and what is required.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    expert_lora: dict[str, Any] | None = None
    num_experts: int = 8
    routing_strategy: str = "mixlora"
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    expert_capacity: int | None = None
    router_z_loss_coef: float | None = None
    sparse_step: int | None = None
    ffn_dropout: float | None = None
    jitter_noise: float | None = None
    router_init_range: float | None = None
    router_aux_loss_coef: float = 0.001
    router_loss: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool = True
    bias: str = "none"
    act_fn: str | None = None
    base_fingerprint: str = "unknown"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(MIXLORA)
        self.routing_strategy = {ours: theirs for theirs, ours in STRATEGIES.items()}.get(
            self.routing_strategy, self.routing_strategy
        )
        if self.routing_strategy not in STRATEGIES:
            raise ValueError(f"routing_strategy={self.routing_strategy!r}: must be one of {list(STRATEGIES)}")
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, _as_list(getattr(self, name)))
        self._resolve_expert_lora()
        ours = self.model_config()
        self.lora_alpha = ours.lora_alpha
        for theirs, name in FIELD_NAMES.items():
            setattr(self, theirs, getattr(ours, name, None))

    def _resolve_expert_lora(self) -> None:
        """Fill in `expert_lora`, so that it is written to the file and the reference can read it."""
        given = dict(self.expert_lora or {})
        for key in given.keys() - set(EXPERT_KEYS):
            # The reference writes its whole LoRA configuration there a second time.
            if key not in REFERENCE_EXPERT_KEYS or (key.startswith("use_") and given[key] != getattr(self, key)):
                raise ValueError(f"expert_lora[{key!r}]={given[key]!r}: the experts have only {list(EXPERT_KEYS)}")
        r = given.get("r", self.r)
        alpha = given.get("lora_alpha")
        if alpha is None:
            same = "r" not in given and self.lora_alpha is not None
            alpha = self.lora_alpha if same else 2 * r if isinstance(r, int) else None
        dropout = given.get("lora_dropout", self.lora_dropout)
        AdapterConfig(lora_dropout=dropout)  # its check of the range
        self.expert_lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout}

    def model_config(self) -> MixLoraConfig:
        """Return the MixLoraConfig of the same adapter, for every linear of every decoder layer.

        PEFT's fields that choose modules (`target_modules` and the like) are not part of it; see `sites.plan_adapter`.
        """
        assert self.expert_lora is not None
        if self.bias != "none":  # here, since PEFT would train what is set on the configuration later
            raise ValueError(f'bias={self.bias!r}: must be "none": a MixLoRA trains no bias of the base')
        if isinstance(self.num_experts, list):
            raise ValueError(f"num_experts={self.num_experts!r}: must be one number in the PEFT method")
        routing = {ours: getattr(self, theirs) for theirs, ours in FIELD_NAMES.items()}
        try:
            return MixLoraConfig(
                **{name: getattr(self, name) for name in SAME_FIELDS},
                expert_r=self.expert_lora["r"],
                expert_alpha=self.expert_lora["lora_alpha"],
                routing_strategy=STRATEGIES[self.routing_strategy],
                router_aux_loss_coef=self.router_aux_loss_coef if self.router_loss else 0.0,
                **{name: value for name, value in routing.items() if value is not None},
            )
        except ValueError as error:
            raise ValueError(_in_peft_words(str(error))) from None


def _as_list(names: Any) -> Any:
    """A list, sorted, so that the same adapter is the same file; strings (a regular expression) stay."""
    return sorted(names) if isinstance(names, (set, tuple, list)) else names


def _in_peft_words(message: str) -> str:
    for theirs, ours in FIELD_NAMES.items():
        if message.startswith(f"{ours}="):
            return theirs + message.removeprefix(ours)
    return message


# ---- a LoRA beside MixLoRAs ----

LORA_FIELDS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "fan_in_fan_out",  # where the base stores its weights transposed is seen from the layer
}
"""Fields of PEFT's LoraConfig that an adapter beside a MixLoRA honours."""


@dataclass
class PeerLoraConfig(LoraConfig):
    """A PEFT LoRA (or DoRA) on the same `PeftModel` as MixLoRAs, saved and loaded as PEFT's LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown()
        self.peft_type = PeftType(MIXLORA)

    def _refuse_unknown(self) -> None:
        defaults = LoraConfig()
        general = {item.name for item in fields(PeftConfig)}
        for item in fields(LoraConfig):
            value = getattr(self, item.name)
            allowed = item.name in LORA_FIELDS or item.name in general or value == getattr(defaults, item.name)
            if item.name == "init_lora_weights":
                allowed = isinstance(value, bool)
            if not allowed:
                raise ValueError(
                    f"{item.name}={value!r}: a LoRA beside a MixLoRA has {sorted(LORA_FIELDS)}; "
                    "load this one into a PeftModel of its own"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as PEFT's LoRA writes them."""
        return super().to_dict() | {"peft_type": "LORA"}

    def model_config(self) -> AdapterConfig:
        """Return the AdapterConfig of the same adapter; see `MixLoraPeftConfig.model_config`."""
        values = {name: getattr(self, name) for name in ADAPTER_FIELDS}
        return AdapterConfig(**values | {"use_dora": bool(self.use_dora)})


def as_peer(config: PeftConfig) -> PeftConfig:
    """Convert a LoraConfig to one that can be used beside MixLoRAs; return other configurations unchanged."""
    if type(config) is not LoraConfig:
        return config
    values = {item.name: getattr(config, item.name) for item in fields(LoraConfig) if item.init}
    return PeerLoraConfig(**values)
