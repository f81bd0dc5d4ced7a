"""A MixLoRA between our folder and the layout that PEFT reads: other names, the same tensors, bit for bit.

The base is needed for the names of its modules only: it is built from its configuration, without weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.names import CANONICAL_LAYERS, PEFT_PREFIX, canonical_of_peft_mixlora, to_peft_mixlora
from minilora_hub.adapter_folder.reading import read_tensors
from minilora_hub.bases.skeleton import BaseSource, skeleton
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError


def to_peft_layout(folder: str | Path, out: str | Path) -> Path:
    """Write a MixLoRA of ours as one that PEFT reads: `PeftModel.from_pretrained(base, out)` after `register()`.

    Args:
        folder: a folder of ours, with config.json and adapter_model.safetensors.
        out: the folder to write, empty or not there yet.

    Returns:
        The folder that was written.

    Raises:
        AdapterError: it is no MixLoRA of ours, its tensors do not fit its configuration, or `out` is not empty.
    """
    from minilora_hub.remote_code.adapter_files import ADAPTER_FILE, read_adapter, write_adapter
    from minilora_hub.remote_code.configuration_minilora import MixLoraConfig

    folder, out = Path(folder), _empty_folder(out)
    if _field(folder / "config.json", "model_type") != "mixlora":
        raise AdapterError(f"{folder}: not a MixLoRA of ours (its config.json says model_type mixlora)")
    config = MixLoraConfig.from_pretrained(folder)
    base = _Base(skeleton(config.text_config, blocks=False))
    tensors = read_adapter(folder / ADAPTER_FILE)
    base.check(folder / ADAPTER_FILE, tensors, config)
    peft_config = _peft_config(config, base, base.targets_in(tensors))
    out.mkdir(parents=True, exist_ok=True)
    peft_config.save_pretrained(str(out))
    write_adapter(out / ADAPTER_FILE, {to_peft_mixlora(name, base.layers_path): t for name, t in tensors.items()})
    return out


def read_peft_mixlora(source: AdapterFolder, base: BaseSource) -> tuple[Any, dict[str, Any]]:
    """Read a MixLoRA in PEFT's layout: the inverse of `to_peft_layout`.

    Returns:
        A MixLoraConfig and ``{canonical name: tensor}``; `write_ours` checks them against the base.

    Raises:
        AdapterError: a tensor is damaged or elsewhere than the base's layers, or ours cannot say something.
        UserWarning, ValueError, TypeError, KeyError, AttributeError: PEFT cannot read the settings.
    """
    from minilora_hub.integrations.peft.method import MixLoraPeftConfig

    folder = source.folder
    described = _Base(base.skeleton)
    peft_config = MixLoraPeftConfig.from_pretrained(str(folder))
    config = _island_config(peft_config, folder)
    tensors = _canonical(read_tensors(folder), described.layers_path)
    chosen = described.targets_in(tensors)
    config.target_modules = "all-linear" if chosen == described.linears else described.island_targets(chosen, folder)
    for pattern in ("rank_pattern", "alpha_pattern"):
        setattr(config, pattern, _moved(getattr(config, pattern), described.layers_path, CANONICAL_LAYERS))
    config.dtype = described.config.dtype
    return config, tensors


class _Base:
    """The modules of a base, without weights.

    Attributes:
        config: the base's configuration.
        layers_path: where its decoder layers are, e.g. ``"model.layers"``.
        linears: {canonical path of a linear in the layers: (out_features, in_features)}.
    """

    def __init__(self, model: Any) -> None:
        from minilora_hub.remote_code.base_structure import find_decoder_layers, linears_in

        self.model, self.config = model, model.config
        self.layers_path, layers = find_decoder_layers(self.model)
        self.linears = {
            f"layers.{index}.{path}": shape
            for index, layer in enumerate(layers)
            for path, shape in linears_in(layer).items()
        }

    def targets_in(self, tensors: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """The linears that have a tensor, with their shapes."""
        adapted = {
            name.removesuffix(".lora_A").replace(".experts.", ".") for name in tensors if name.endswith("lora_A")
        }
        return {path: shape for path, shape in self.linears.items() if path in adapted}

    def check(self, path: Path, tensors: dict[str, Any], config: Any) -> None:
        """Raise an AdapterError that names a tensor which is missing, surplus or misshapen."""
        from minilora_hub.remote_code.adapter_files import check_tensors
        from minilora_hub.remote_code.attach import expected_tensors
        from minilora_hub.remote_code.base_structure import LinearSite, MixtureSite

        chosen = self.targets_in(tensors)
        blocks = {name.removesuffix(".router") for name in tensors if name.endswith(".router")}
        blocks |= {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
        sites: list[Any] = []
        unseen: Any = None  # what a block computes does not matter for names and shapes
        for name, shape in chosen.items():
            if name.rpartition(".")[0] not in blocks:
                sites.append(LinearSite(name, name, *shape))
        for block in blocks:
            inside = {name: shape for name, shape in chosen.items() if name.rpartition(".")[0] == block}
            targets = tuple((name.rpartition(".")[2], *shape) for name, shape in inside.items())
            if targets:
                sites.append(MixtureSite(block, block, unseen, self.config.get_text_config().hidden_size, targets))
        try:
            check_tensors(path, tensors, expected_tensors(config, sites))
        except ValueError as error:
            raise AdapterError(str(error)) from error
        if not blocks:
            raise AdapterError(f"{path}: no router in it, so it is no MixLoRA")

    def peft_targets(self, chosen: dict[str, Any]) -> list[str]:
        """The shortest names that PEFT matches to exactly these linears."""
        paths = {f"{self.layers_path}.{name.removeprefix('layers.')}" for name in chosen}
        others = {path.rpartition(".")[2] for path, _ in self.model.named_modules() if path not in paths}
        leaves = {path.rpartition(".")[2] for path in paths}
        return sorted(leaves if not leaves & others else paths)

    def island_targets(self, chosen: dict[str, Any], folder: Path) -> list[str]:
        """The paths within a layer that are adapted, which our layout has the same in every layer."""
        names = {name.split(".", 2)[2] for name in chosen}
        absent = [name for name in self.linears if name.split(".", 2)[2] in names and name not in chosen]
        if absent:
            raise AdapterError(
                f"{folder}: {absent[0]} is not adapted, but is in other layers (layers_to_transform or "
                "exclude_modules): ours adapts the same linears in every layer"
            )
        return sorted(names)


def _field(path: Path, name: str) -> Any:
    document = strict_json(path.read_bytes()) if path.is_file() else None
    return document.get(name) if isinstance(document, dict) else None


def _empty_folder(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"out={str(out)!r}: must be a folder that is empty, or not there yet")
    return out


def _canonical(tensors: dict[str, Any], layers_path: str) -> dict[str, Any]:
    start = f"{PEFT_PREFIX}{layers_path}."
    for name in tensors:
        if not name.startswith(start):
            raise AdapterError(f"{name}: not a tensor under {start!r}, where the base has its layers")
    try:
        return {canonical_of_peft_mixlora(name): tensor for name, tensor in tensors.items()}
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _moved(pattern: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Keys that start at the list of layers, under its other path."""
    return {new + key.removeprefix(old) if key.startswith(f"{old}.") else key: v for key, v in pattern.items()}


def _peft_config(config: Any, base: _Base, chosen: dict[str, Any]) -> Any:
    from minilora_hub.integrations.peft.config import ISLAND_NAMES
    from minilora_hub.integrations.peft.method import MixLoraPeftConfig

    last = base.layers_path.rpartition(".")[2]

    def in_base(pattern: dict[str, Any]) -> dict[str, Any]:
        return {
            last + key.removeprefix("layers") if key.startswith("layers.") else key: v for key, v in pattern.items()
        }

    routing: dict[str, Any] = {theirs: getattr(config, ours, None) for theirs, ours in ISLAND_NAMES.items()}
    expert_alpha = config.expert_alpha
    if expert_alpha is None:
        expert_alpha = config.lora_alpha if config.expert_r is None else 2 * config.expert_r
    return MixLoraPeftConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.base_model_revision,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        expert_lora={"r": config.expert_r or config.r, "lora_alpha": expert_alpha, "lora_dropout": config.lora_dropout},
        num_experts=config.num_experts,
        routing_strategy=config.routing_strategy,
        router_aux_loss_coef=config.router_aux_loss_coef,
        target_modules=base.peft_targets(chosen),
        rank_pattern=_moved(config.rank_pattern, CANONICAL_LAYERS, base.layers_path),
        alpha_pattern=_moved(config.alpha_pattern, CANONICAL_LAYERS, base.layers_path),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        base_fingerprint=config.base_fingerprint,
        **routing,
    )


def _island_config(peft_config: Any, folder: Path) -> Any:
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(peft_config, name):
            raise AdapterError(f"{folder}: {name}={getattr(peft_config, name)!r}: ours holds a MixLoRA's tensors only")
    experts = peft_config.expert_lora
    if experts["lora_dropout"] != peft_config.lora_dropout:
        raise AdapterError(
            f"{folder}: expert_lora has lora_dropout={experts['lora_dropout']}, the rest {peft_config.lora_dropout}: "
            "ours has one for both"
        )
    config = peft_config.island_config()
    if (config.expert_r, config.expert_alpha) == (config.r, config.lora_alpha):
        config.expert_r = config.expert_alpha = None  # as written by hand, and read by older code
    return config
