"""The configurations of MixLoRA and DoRA adapters. What they share is in `configuration_adapter.py`."""

from typing import Any

from .configuration_adapter import AdapterConfig, is_int, is_number, require


class DoraConfig(AdapterConfig):
    """Configuration of a DoRA adapter (weight-decomposed LoRA, arXiv 2402.09353), with `AdapterConfig`'s fields."""

    model_type = "dora"

    def __init__(self, r: int = 16, lora_alpha: float | None = None, use_dora: bool = True, **kwargs: Any) -> None:
        super().__init__(r=r, lora_alpha=lora_alpha, use_dora=use_dora, **kwargs)

    def _check(self) -> None:
        super()._check()
        self._require(bool, "a DoRA adapter has it on; plain LoRA is PEFT's LoraConfig", "use_dora")


STRATEGY_DEFAULTS: dict[str, dict[str, Any]] = {
    "top_k": {"num_experts_per_tok": 2, "router_init_range": 0.02, "router_jitter_noise": 0.0},
    "top_p": {"router_top_p": 0.8, "router_temperature": 0.0, "router_init_range": 0.02, "router_jitter_noise": 0.0},
    "switch": {
        "num_experts_per_tok": 1, "expert_capacity": 32, "router_z_loss_coef": 0.001, "router_sparse_step": 1,
        "router_init_range": 1.0, "router_jitter_noise": 0.01,
    },
    "arrow": {
        "num_experts_per_tok": 2, "router_temperature": 1.0, "router_init_range": 0.02, "router_jitter_noise": 0.0,
    },
}  # fmt: skip
"""Routing strategy -> the fields it has, with its defaults: those of the reference (`moe_peft` 2.0.2), which has no
arrow."""

STRATEGY_FIELDS = tuple(dict.fromkeys(name for fields in STRATEGY_DEFAULTS.values() for name in fields))

REFERENCE_NAMES = {
    "top_k": "num_experts_per_tok", "top_p": "router_top_p", "temperature": "router_temperature",
    "jitter_noise": "router_jitter_noise", "sparse_step": "router_sparse_step", "ffn_dropout": "expert_dropout",
}  # fmt: skip
"""The reference's names for our fields. transformers would store them as attributes, unread, and copy the first three
into the generation settings."""


def _require_known(strategy: Any) -> None:
    names = ", ".join(f'"{name}"' for name in STRATEGY_DEFAULTS)
    known = isinstance(strategy, str) and strategy in STRATEGY_DEFAULTS
    require(known, "routing_strategy", strategy, f"this version of the code knows {names}")


class MixLoraConfig(AdapterConfig):
    """Configuration of a MixLoRA adapter (a mixture of LoRA experts in the feed-forward block, arXiv 2404.15159).

    A field that only some routing strategies have is None under the others, and refused there when it is given.

    Args:
        num_experts: LoRA experts of a router, at least 1; or a list with the number of each layer (arXiv 2402.08562).
        num_experts_per_tok: experts that serve each token, 1 to the least of `num_experts`. Default: 2; 1 for
            ``"switch"``, which allows nothing else. ``"top_p"`` does not have it: there the number differs from token
            to token. (A field ``top_k`` would be copied into the generation settings, where it changes sampling.)
        expert_r: rank of the experts. Default: `r`, which is then the rank on attention.
        expert_alpha: alpha of the experts. Default: `lora_alpha`; ``2 * expert_r`` if only `expert_r` is given.
        routing_strategy: ``"top_k"``, ``"top_p"``, ``"switch"`` or ``"arrow"``: see `routing.py`.
        router_top_p: ``"top_p"`` only: above 0, at most 1. Default: 0.8.
        router_temperature: ``"top_p"``: the probabilities are divided by it before they are compared with
            `router_top_p` and used as weights. 0, the default: they are not. ``"arrow"``: the products are divided by
            it before the softmax; above 0. Default: 1.
        expert_capacity: ``"switch"`` only: tokens of one sequence that one expert serves in training. Default: 32.
        router_z_loss_coef: ``"switch"`` only: weight of the router's z-loss in training. Default: 0.001.
        router_sparse_step: ``"switch"`` only: one layer in this many is a mixture (layers 1, 1 + n, 1 + 2n, …); the
            others get plain LoRA on their feed-forward block. Default: 1, every layer.
        router_aux_loss_coef: weight of the load-balance loss in training.
        router_init_range: standard deviation of a fresh router. Default: 0.02; 1.0 for ``"switch"``.
        router_jitter_noise: in training, the router's input is multiplied by U(1 - noise, 1 + noise). Default: 0; 0.01
            for ``"switch"``.
        expert_dropout: dropout probability on the mixture's output, in training only.
        router_scope: what has a router and experts. None: each feed-forward block, with plain LoRA on attention.
            ``"linear"``: each linear in `target_modules`, with experts of rank `r`; see `routed_linear.py`.
        output_router_logits: whether forward returns router logits and the balance loss by default.
        use_dora: DoRA on attention and experts alike ("MixDoRA"). Default: plain LoRA on both.
        **kwargs: see `AdapterConfig`.
    """

    model_type = "mixlora"

    def __init__(
        self,
        r: int = 16,
        lora_alpha: float | None = None,
        num_experts: int | list[int] = 8,
        num_experts_per_tok: int | None = None,
        expert_r: int | None = None,
        expert_alpha: float | None = None,
        routing_strategy: str = "top_k",
        router_top_p: float | None = None,
        router_temperature: float | None = None,
        expert_capacity: int | None = None,
        router_z_loss_coef: float | None = None,
        router_sparse_step: int | None = None,
        router_aux_loss_coef: float = 0.001,
        router_init_range: float | None = None,
        router_jitter_noise: float | None = None,
        expert_dropout: float = 0.0,
        router_scope: str | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        _require_known(routing_strategy)  # first: the error must not be about the strategy's fields
        for name in sorted(kwargs.keys() & REFERENCE_NAMES.keys()):
            raise ValueError(f"{name}={kwargs[name]!r}: this field is called {REFERENCE_NAMES[name]!r} here")
        self.num_experts = list(num_experts) if isinstance(num_experts, tuple) else num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.expert_r = expert_r
        self.expert_alpha = expert_alpha
        self.routing_strategy = routing_strategy
        self.router_top_p = router_top_p
        self.router_temperature = router_temperature
        self.expert_capacity = expert_capacity
        self.router_z_loss_coef = router_z_loss_coef
        self.router_sparse_step = router_sparse_step
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_init_range = router_init_range
        self.router_jitter_noise = router_jitter_noise
        self.expert_dropout = expert_dropout
        self.router_scope = router_scope
        self.output_router_logits = output_router_logits
        self._fill_in_strategy()
        super().__init__(r=r, lora_alpha=lora_alpha, **kwargs)
        if router_scope is not None or isinstance(num_experts, (list, tuple)):
            self.format_version = 4

    def _fill_in_strategy(self) -> None:
        """Set the strategy's defaults for fields that are not given; refuse fields that it does not have."""
        _require_known(self.routing_strategy)
        defaults = STRATEGY_DEFAULTS[self.routing_strategy]
        for name in STRATEGY_FIELDS:
            value = getattr(self, name)
            if value is None:
                setattr(self, name, defaults.get(name))
            else:
                having = [f'"{strategy}"' for strategy, fields in STRATEGY_DEFAULTS.items() if name in fields]
                need = f'only routing_strategy {" and ".join(having)} has it, this is "{self.routing_strategy}"'
                require(name in defaults, name, value, need)

    def to_diff_dict(self) -> dict[str, Any]:
        """Leave out the fields that the strategy does not have: older code reads a top-k adapter's file."""
        fields, defaults = super().to_diff_dict(), STRATEGY_DEFAULTS.get(self.routing_strategy, {})
        for announced in ("output_router_logits", "router_aux_loss_coef"):  # by the model, for trainers
            if not hasattr(type(self.text_config), announced):
                (fields.get("text_config") or {}).pop(announced, None)
        return {name: value for name, value in fields.items() if name in defaults or name not in STRATEGY_FIELDS}

    def _check(self) -> None:
        self._fill_in_strategy()  # again, for fields that were set on a configuration
        super()._check()
        need = "must be an integer of at least 1, or a list of them, one for each layer"
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        require(counts and all(is_int(n, 1) for n in counts), "num_experts", self.num_experts, need)
        self._require(lambda names: not names, "a MixLoRA does not go on experts of the base", "target_parameters")
        self._check_strategy()
        self._require(is_number, "must be a number of at least 0", "router_aux_loss_coef", "router_init_range")
        self._require(lambda p: is_number(p) and p < 1, "must be in [0, 1)", "router_jitter_noise", "expert_dropout")
        self._require(lambda r: r is None or is_int(r, 1), "must be an integer of at least 1", "expert_r")
        self._require(
            lambda alpha: alpha is None or (is_number(alpha) and alpha > 0), "must be a number above 0", "expert_alpha"
        )
        self._require(lambda scope: scope in (None, "linear"), 'must be None or "linear"', "router_scope")
        if self.router_scope is not None:
            need = 'router_scope="linear" does not have it; r and lora_alpha are those of the experts'
            self._require(lambda value: not value, need, "expert_r", "expert_alpha", "use_dora", "expert_dropout")

    def _check_strategy(self) -> None:
        """Check the fields that `routing_strategy` has."""
        is_count, count = (lambda n: is_int(n, 1)), "must be an integer of at least 1"
        if self.routing_strategy in ("top_k", "arrow"):
            experts = min(self.num_experts) if isinstance(self.num_experts, list) else self.num_experts
            need = f"must be an integer from 1 to num_experts={self.num_experts}"
            self._require(lambda k: is_int(k, 1) and k <= experts, need, "num_experts_per_tok")
            self._require(lambda t: t is None or (is_number(t) and t > 0), "must be above 0", "router_temperature")
        elif self.routing_strategy == "top_p":
            need = "must be a number above 0, at most 1"
            self._require(lambda p: is_number(p, maximum=1) and p > 0, need, "router_top_p")
            self._require(is_number, "must be a number of at least 0; 0 means none", "router_temperature")
        else:
            need = 'must be 1 under routing_strategy "switch"'
            self._require(lambda k: is_int(k, 1) and k == 1, need, "num_experts_per_tok")
            self._require(is_count, count, "expert_capacity", "router_sparse_step")
            self._require(is_number, "must be a number of at least 0", "router_z_loss_coef")

    def experts_by_layer(self, layers: int) -> list[int]:
        """Return the number of experts of a router in each of so many layers."""
        given = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts] * layers
        need = f"must be one number, or a list of {layers}: one for each layer of the base"
        require(len(given) == layers, "num_experts", self.num_experts, need)
        return given

    def has_mixture(self, layer: int) -> bool:
        """Whether the feed-forward block of the layer with this index is a mixture, as in Switch Transformers."""
        step = self.router_sparse_step or 1
        return step == 1 or layer % step == 1

    def expert_rank_and_scaling(self, path: str) -> tuple[int, float]:
        """Return rank and scaling of the experts on the projection at `path`."""
        alpha = self.expert_alpha
        if alpha is None:
            alpha = self.lora_alpha if self.expert_r is None else 2 * self.expert_r
        return self.rank_and_scaling(path, self.expert_r or self.r, alpha)
