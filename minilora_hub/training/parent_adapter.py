"""Continue from an adapter: its method and settings for the run, its weights for the model, its place on the card.

An adapter in our format, or a LoRA or DoRA in PEFT's, is read strictly by the readers of `formats`. What its tensors'
shapes and meaning depend on is fixed; what only matters in training, and how a router is used, may be changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.folders import AdapterFolder, read_source
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.reading import UNKNOWN, fingerprint_trained_on
from minilora_hub.adapter_folder.results import Parent
from minilora_hub.errors import AdapterError, TrainingError
from minilora_hub.training.objective_specs import parse_objectives
from minilora_hub.training.recipes import adapter_field_names
from minilora_hub.training.settings import OWN_FIELDS, RECIPE_FIELDS, TrainingSettings, make_settings

if TYPE_CHECKING:
    import torch

    from minilora_hub.bases.skeleton import BaseSource

CHANGEABLE = (
    "lora_dropout",
    "expert_dropout",
    "num_experts_per_tok",
    "routing_strategy",
    "router_top_p",
    "router_temperature",
    "expert_capacity",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
)
"""Fields of an adapter's configuration that a run which continues from it may set."""
OF_A_STRATEGY = (
    "num_experts_per_tok",
    "router_top_p",
    "router_temperature",
    "expert_capacity",
    "router_z_loss_coef",
    "router_sparse_step",
    "router_jitter_noise",
)
"""Those whose defaults depend on the routing strategy."""


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter that a run reads.

    Attributes:
        name: as it was given: a folder or a Hub id.
        source: its folder.
        revision: its commit on the Hub; None for a folder.
    """

    name: str
    source: AdapterFolder
    revision: str | None = None

    @property
    def sha256(self) -> str:
        """The hash of its weights."""
        return file_sha256(self.source.folder / WEIGHTS)

    @property
    def base_fingerprint(self) -> str:
        """The hash of the base's weights it was trained on, from its configuration or its results.json."""
        return fingerprint_trained_on(self.source)

    def described(self, learned: str) -> Parent:
        """Return what results.json says of it."""
        name = self.name if self.revision else Path(self.name).resolve().name
        return Parent(name, revision=self.revision, weights_sha256=self.sha256, learned=learned)


def find_adapter(name: str, revision: str | None = None) -> FoundAdapter:
    """Find an adapter by its folder or its Hub id, which is downloaded; none of its code runs.

    Raises:
        AdapterError: it does not exist, is of no known kind, or refers to code of another repo.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")):
        if revision is not None:
            raise TrainingError(f"from_revision={revision!r}: {name!r} is a folder, which has no revisions")
        return FoundAdapter(name, read_source(folder))
    from minilora_hub.hub.client import fetch

    folder, commit = fetch(name, revision=revision, token=None, progress=True)
    return FoundAdapter(name, read_source(folder, name), commit)


def complete_settings(*sources: Mapping[str, Any]) -> TrainingSettings:
    """Make settings as `make_settings` does; with ``from_adapter`` the adapter's own ones take the defaults' place.

    Raises:
        TrainingError: as `make_settings`, or a setting that the adapter fixes is given.
    """
    given: dict[str, Any] = {}
    for source in sources:
        given |= {name.replace("-", "_"): value for name, value in source.items() if value is not None}
    if not given.get("from_adapter"):
        return make_settings(*sources)
    found = find_adapter(str(given["from_adapter"]), given.get("from_revision"))
    base, base_revision = found.source.named_base(given.get("base"), given.get("base_revision"))
    inherited: dict[str, Any] = {"base": base, "base_revision": base_revision}
    method, adapter = method_of(found), inherited_fields(found, base, base_revision)
    if given.get("method") not in (None, method):
        raise TrainingError(f"method={given['method']!r}: {found.name!r} is a {method}: leave it out")
    fixed = adapter_field_names(method, adapter) - {*CHANGEABLE}
    asked = {name: value for name, value in given.items() if name not in (*OWN_FIELDS, *RECIPE_FIELDS)}
    asked |= given.get("adapter") or {}
    for name, value in asked.items():
        if name in fixed and value != adapter.get(name):
            raise TrainingError(
                f"{name}={value!r}: the adapter {found.name!r} fixes it to {adapter.get(name)!r}; "
                f"{', '.join(CHANGEABLE)} can be changed"
            )
    if asked.get("routing_strategy", adapter.get("routing_strategy")) != adapter.get("routing_strategy"):
        adapter = {name: value for name, value in adapter.items() if name not in OF_A_STRATEGY}
    settings = make_settings(
        inherited | {"method": method, "adapter": adapter}, *sources, {"from_revision": found.revision}
    )
    require_router_gradient(settings)
    return settings


def method_of(found: FoundAdapter) -> str:
    """Return the training method that an adapter is continued with."""
    source = found.source
    return "mixdora" if source.method == "mixlora" and source.config.get("use_dora") else source.method


def inherited_fields(found: FoundAdapter, base: str | None, revision: str | None) -> dict[str, Any]:
    """Return the fields of an adapter's configuration, without those that are not set."""
    from minilora_hub.bases.skeleton import find_base

    config, _ = read_canonical(found, find_base(base, revision))
    values = config.to_dict()
    names = adapter_field_names(method_of(found), {})
    return {name: values[name] for name in sorted(names) if values.get(name) is not None}


def read_canonical(found: FoundAdapter, base: BaseSource) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read an adapter's configuration and ``{canonical name: tensor}``, and check them against the base.

    Raises:
        AdapterError: something in it cannot be honoured; the message names it.
    """
    from minilora_hub.adapter_folder.reading import read_ours
    from minilora_hub.formats.peft_conversion import as_ours
    from minilora_hub.formats.peft_reading import read_peft
    from minilora_hub.remote_code.configuration_minilora import DoraConfig
    from minilora_hub.training.lora_model import LoraConfig

    source = found.source
    if source.dialect == "minilora":
        config, tensors, _ = read_ours(source, base)
        return config, tensors
    config, tensors = as_ours(read_peft(source, base), DoraConfig if source.method == "dora" else LoraConfig)
    layers = base.layers_path.rpartition(".")[2]
    if source.method == "lora" and layers != "layers" and (config.rank_pattern or config.alpha_pattern):
        raise AdapterError(
            f"adapter {found.name!r}: rank_pattern and alpha_pattern cannot be written for PEFT on a base whose "
            f"layers are under {layers!r}: only one rank and alpha for all linears can be continued"
        )
    return config, tensors


def load_parent(model: Any, found: FoundAdapter, base: BaseSource) -> tuple[str, ...]:
    """Put an adapter's tensors into a fresh adapter with its configuration, and return notes for the user.

    Raises:
        TrainingError: it was trained on a base with other weights.
        ValueError: a tensor does not fit.
    """
    import torch

    from minilora_hub.remote_code.adapter_files import check_tensors

    trained_on, here = found.base_fingerprint, model.config.base_fingerprint
    if UNKNOWN not in (trained_on, here) and trained_on != here:
        raise TrainingError(
            f"from_adapter={found.name!r}: it was trained on a base with fingerprint {trained_on}, and the base "
            f"{base.name!r} has {here}: pass --base with the base that it was trained on"
        )
    _, tensors = read_canonical(found, base)
    parameters = model.adapter_parameters()
    check_tensors(found.name, tensors, {name: parameter.shape for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    if UNKNOWN in (trained_on, here):
        return (f"{found.name} does not say which weights its base had: only the shapes were compared",)
    return ()


def choose_trainable(model: Any, learn: str, base: BaseSource) -> None:
    """Let a part of an adapter learn: ``"all"``, ``"router"``, ``"experts"`` or ``"attention"``.

    Attention is every adapted linear outside the feed-forward blocks, experts are a mixture's updates without router.

    Raises:
        TrainingError: the adapter has no such part.
    """
    if learn == "all":
        return
    parameters = model.adapter_parameters()
    if learn == "attention":
        from minilora_hub.remote_code.base_structure import LinearSite, plan_sites
        from minilora_hub.remote_code.configuration_minilora import MixLoraConfig

        outside = {site.name for site in plan_sites(base.skeleton, MixLoraConfig()) if isinstance(site, LinearSite)}
        learned = {name for name in parameters if name.rpartition(".")[0].removesuffix(".experts") in outside}
        learned -= {name for name in parameters if name.endswith(".router")}
    else:
        learned = {name for name in parameters if (".router" if learn == "router" else ".experts.") in name}
    if not learned:
        raise TrainingError(
            f"learn={learn!r}: the adapter has no such part; it has {', '.join(sorted(parameters)[:2])}"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in learned)


def require_router_gradient(settings: TrainingSettings) -> None:
    """Refuse to train only a router that gets no gradient: a single weight, divided by its sum, is always 1."""
    adapter = settings.recipe.adapter
    strategy = adapter.get("routing_strategy", "top_k")
    single = strategy in ("top_k", "arrow") and adapter.get("num_experts_per_tok") == 1
    if settings.learn == "router" and single:
        raise TrainingError(
            f"num_experts_per_tok=1: with {strategy} routing the weight of the one expert is always 1, so the loss "
            "gives the router no gradient: pass --set num_experts_per_tok=2 or more, or --set routing_strategy=switch, "
            "whose weight is the probability"
        )


def hashes_of_inputs(settings: TrainingSettings) -> dict[str, str]:
    """Return ``{adapter or file: sha256}`` of what a run reads beside base and data, which a resumed run must find."""
    names = [(settings.from_adapter, settings.from_revision)] if settings.from_adapter else []
    names += [(name, None) for name in settings.keep]
    hashes = {}
    for spec in parse_objectives(settings.objective):
        if spec.name == "distill":
            names.append((spec.values["teacher"], None))
        if spec.name == "anchor":
            text = spec.values["data"]
            try:
                hashes[text] = file_sha256(Path(text).expanduser())
            except OSError as error:
                raise TrainingError(f"objective: anchor's data={text!r} cannot be read: {error.strerror}") from error
    return hashes | {name: find_adapter(name, revision).sha256 for name, revision in names}
