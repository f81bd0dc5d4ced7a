"""The configurations of MixLoRA and DoRA adapters. What they share is in `configuration_adapter.py`."""

from .configuration_adapter import AdapterConfig, is_int, is_number, require


class DoraConfig(AdapterConfig):
    """Configuration of a DoRA adapter (weight-decomposed LoRA, arXiv 2402.09353), with `AdapterConfig`'s fields."""

    model_type = "dora"

    def __init__(self, r=16, lora_alpha=None, use_dora=True, **kwargs):
        super().__init__(r=r, lora_alpha=lora_alpha, use_dora=use_dora, **kwargs)

    def _check(self):
        super()._check()
        require(self.use_dora, "use_dora", self.use_dora, "a DoRA adapter has it on; plain LoRA is PEFT's LoraConfig")


STRATEGY_DEFAULTS = {
    "top_k": {"num_experts_per_tok": 2, "router_init_range": 0.02, "router_jitter_noise": 0.0},
    "top_p": {
        "router_top_p": 0.8,
        "router_temperature": 0.0,
        "router_init_range": 0.02,
        "router_jitter_noise": 0.0,
    },
    "switch": {
        "num_experts_per_tok": 1,
        "expert_capacity": 32,
        "router_z_loss_coef": 0.001,
        "router_sparse_step": 1,
        "router_init_range": 1.0,
        "router_jitter_noise": 0.01,
    },
}
"""Routing strategy -> the fields it has, with its defaults, which are those of the reference (`moe_peft` 2.0.2)."""

STRATEGY_FIELDS = tuple(dict.fromkeys(name for fields in STRATEGY_DEFAULTS.values() for name in fields))

REFERENCE_NAMES = {
    "top_k": "num_experts_per_tok",
    "top_p": "router_top_p",
    "temperature": "router_temperature",
    "jitter_noise": "router_jitter_noise",
    "sparse_step": "router_sparse_step",
    "ffn_dropout": "expert_dropout",
}
"""Names that the reference's configuration has for our fields. transformers would keep them as attributes, unread, and
copy the first three into the generation settings."""


def _listed_strategies():
    return ", ".join(f'"{strategy}"' for strategy in STRATEGY_DEFAULTS)


class MixLoraConfig(AdapterConfig):
    """Configuration of a MixLoRA adapter (a mixture of LoRA experts in the feed-forward block, arXiv 2404.15159).

    A field that only some routing strategies have is None under the others, and refused there when it is given.

    Args:
        num_experts: LoRA experts per feed-forward block, at least 1.
        num_experts_per_tok: experts that serve each token, 1 to `num_experts`. Default: 2; 1 for ``"switch"``, which
            allows nothing else. ``"top_p"`` does not have it: there the number differs from token to token. (The field
            is not called ``top_k``, because transformers copies a field of that name into the generation settings,
            where it changes sampling.)
        expert_r: rank of the experts. Default: `r`, which is then the rank on attention.
        expert_alpha: alpha of the experts. Default: `lora_alpha` if `expert_r` is not given either, else ``2 *
            expert_r``.
        routing_strategy: ``"top_k"``: softmax, the k largest, divided by their sum. ``"top_p"``: the most probable
            experts until their probabilities exceed `router_top_p`, not divided by their sum. ``"switch"``: the most
            probable expert, weighted with its probability; in training each expert takes `expert_capacity` tokens of a
            sequence. See `routing.py`.
        router_top_p: ``"top_p"`` only: above 0, at most 1. Default: 0.8.
        router_temperature: ``"top_p"`` only: the probabilities are divided by it before they are compared with
            `router_top_p` and used as weights. 0, the default: they are not.
        expert_capacity: ``"switch"`` only: tokens of one sequence that one expert serves in training. Default: 32.
        router_z_loss_coef: ``"switch"`` only: weight of the router's z-loss in training. Default: 0.001.
        router_sparse_step: ``"switch"`` only: one layer in this many is a mixture (layers 1, 1 + n, 1 + 2n, …); the
            others get plain LoRA on their feed-forward block. Default: 1, every layer.
        router_aux_loss_coef: weight of the load-balance loss in training.
        router_init_range: standard deviation of a fresh router. Default: 0.02; 1.0 for ``"switch"``.
        router_jitter_noise: in training, the router's input is multiplied by U(1 - noise, 1 + noise). Default: 0; 0.01
            for ``"switch"``.
        expert_dropout: dropout probability on what the mixture puts out, in training only. (`lora_dropout` is the one
            inside the experts, on their low-rank path.)
        output_router_logits: whether forward returns router logits and the balance loss when not told.
        use_dora: DoRA on attention and experts alike ("MixDoRA"). Default: plain LoRA on both.
        **kwargs: see `AdapterConfig`.
    """

    model_type = "mixlora"

    def __init__(
        self,
        r=16,
        lora_alpha=None,
        num_experts=8,
        num_experts_per_tok=None,
        expert_r=None,
        expert_alpha=None,
        routing_strategy="top_k",
        router_top_p=None,
        router_temperature=None,
        expert_capacity=None,
        router_z_loss_coef=None,
        router_sparse_step=None,
        router_aux_loss_coef=0.001,
        router_init_range=None,
        router_jitter_noise=None,
        expert_dropout=0.0,
        output_router_logits=False,
        **kwargs,
    ):
        # First, so that code which does not know a strategy says so, and not something about the strategy's fields.
        known = isinstance(routing_strategy, str) and routing_strategy in STRATEGY_DEFAULTS
        require(known, "routing_strategy", routing_strategy, f"this version of the code knows {_listed_strategies()}")
        for name in sorted(kwargs.keys() & REFERENCE_NAMES.keys()):
            raise ValueError(f"{name}={kwargs[name]!r}: this field is called {REFERENCE_NAMES[name]!r} here")
        self.num_experts = num_experts
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
        self.output_router_logits = output_router_logits
        self._fill_in_strategy()
        super().__init__(r=r, lora_alpha=lora_alpha, **kwargs)

    def _fill_in_strategy(self):
        """The strategy's own defaults where nothing is given; what it does not have must not be given."""
        defaults = STRATEGY_DEFAULTS[self.routing_strategy]
        for name in STRATEGY_FIELDS:
            value = getattr(self, name)
            if value is None:
                setattr(self, name, defaults.get(name))
            else:
                having = [f'"{strategy}"' for strategy, fields in STRATEGY_DEFAULTS.items() if name in fields]
                need = f'only routing_strategy {" and ".join(having)} has it, this is "{self.routing_strategy}"'
                require(name in defaults, name, value, need)

    def to_diff_dict(self):
        """Fields that the strategy does not have are left out: a top-k adapter's file is one that older code reads."""
        fields, defaults = super().to_diff_dict(), STRATEGY_DEFAULTS[self.routing_strategy]
        for announced in ("output_router_logits", "router_aux_loss_coef"):  # by the model, for trainers
            if not hasattr(type(self.text_config), announced):
                (fields.get("text_config") or {}).pop(announced, None)
        return {name: value for name, value in fields.items() if name in defaults or name not in STRATEGY_FIELDS}

    def _check(self):
        super()._check()
        require(is_int(self.num_experts, 1), "num_experts", self.num_experts, "must be an integer of at least 1")
        self._check_strategy()
        for name in ("router_aux_loss_coef", "router_init_range"):
            require(is_number(getattr(self, name)), name, getattr(self, name), "must be a number of at least 0")
        for name in ("router_jitter_noise", "expert_dropout"):
            value = getattr(self, name)
            require(is_number(value) and value < 1, name, value, "must be in [0, 1)")
        require(
            self.expert_r is None or is_int(self.expert_r, 1),
            "expert_r",
            self.expert_r,
            "must be an integer of at least 1",
        )
        require(
            self.expert_alpha is None or (is_number(self.expert_alpha) and self.expert_alpha > 0),
            "expert_alpha",
            self.expert_alpha,
            "must be a number above 0",
        )

    def _check_strategy(self):
        """The ranges of what `routing_strategy` has."""
        most = 1 if self.routing_strategy == "switch" else self.num_experts
        limits = {
            "num_experts_per_tok": (
                lambda k: is_int(k, 1) and k <= most,
                f"must be an integer from 1 to num_experts={self.num_experts}"
                if self.routing_strategy == "top_k"
                else 'must be 1 under routing_strategy "switch"',
            ),
            "router_top_p": (lambda p: is_number(p, maximum=1) and p > 0, "must be a number above 0, at most 1"),
            "router_temperature": (is_number, "must be a number of at least 0; 0 means none"),
            "expert_capacity": (lambda n: is_int(n, 1), "must be an integer of at least 1"),
            "router_z_loss_coef": (is_number, "must be a number of at least 0"),
            "router_sparse_step": (lambda n: is_int(n, 1), "must be an integer of at least 1"),
        }
        for name in limits.keys() & STRATEGY_DEFAULTS[self.routing_strategy].keys():
            fits, need = limits[name]
            require(fits(getattr(self, name)), name, getattr(self, name), need)

    def has_mixture(self, layer):
        """Whether the feed-forward block of the layer with this index is a mixture, as in Switch Transformers."""
        step = self.router_sparse_step or 1
        return step == 1 or layer % step == 1

    def expert_rank_and_scaling(self, path):
        """Rank and scaling of the experts on the projection at `path`."""
        alpha = self.expert_alpha
        if alpha is None:
            alpha = self.lora_alpha if self.expert_r is None else 2 * self.expert_r
        return self.rank_and_scaling(path, self.expert_r or self.r, alpha)
