"""Check that the configuration loads, and that the tensors are finite and exactly those that it implies.

The expected tensors follow from the structure that `text_config` describes; the base's weights are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from minilora_hub.adapter_folder.names import PEFT_CONFIG, WEIGHTS, from_peft
from minilora_hub.adapter_folder.tasks import CAUSAL_LM, CLASS_PREFIXES, PIPELINES, auto_class_of, own_auto_map
from minilora_hub.publish.checks.base import base_of
from minilora_hub.publish.checks.problems import Folder, Problem

SHOWN = 3
HEADS = tuple(PIPELINES)
RETRAIN = "save the adapter again from the model it was trained in; damaged weights cannot be repaired"
PEFT_TENSOR = re.compile(r"base_model\.model\..+\.(lora_[AB]\.weight|lora_magnitude_vector(\.weight)?)")


def check_adapter(folder: Folder) -> Iterator[Problem]:
    """Check that the configuration loads, and that the tensors are exactly those it implies."""
    if folder.peft_layout:
        yield from _check_peft(folder, "")
        return
    if not folder.config:
        return  # missing, or not JSON: found by other checks
    yield from _check_architectures(folder)
    config, problems = load_config(folder)
    yield from problems
    if config is None:
        yield from _check_values(folder, WEIGHTS)
        return
    expected, layers_path, reason = expected_tensors(config, auto_class_of(folder.config))
    if expected is None:
        message = f"whether its tensors are the right ones is unknown: no base can be built from text_config ({reason})"
        yield Problem("tensors-unknown", WEIGHTS, message, "minilora verify loads it on the real base", blocking=False)
    yield from _check_values(folder, WEIGHTS, expected)
    if f"peft/{WEIGHTS}" in folder.files or f"peft/{PEFT_CONFIG}" in folder.files:
        yield from _check_peft(folder, "peft/")
        yield from _check_same(folder, layers_path)


def expected_tensors(config: Any, auto_class: str = CAUSAL_LM) -> tuple[dict[str, tuple[int, ...]] | None, str, str]:
    """Return {name: shape} of every tensor that a configuration implies, and the path of the base's layers.

    Returns:
        None instead of the tensors where they cannot be determined; the third value is the reason.
    """
    from minilora_hub.bases.skeleton import skeleton
    from minilora_hub.remote_code import attach
    from minilora_hub.remote_code.base_structure import plan_sites
    from minilora_hub.remote_code.heads import saved_parameters
    from minilora_hub.remote_code.layer_stacks import find_layer_stacks

    try:
        base = skeleton(config.text_config, config.model_type == "mixlora", auto_class, config.towers)
        sites = plan_sites(base, config)
        saved = saved_parameters(base, config.modules_to_save, [site.path for site in sites])
        expected = attach.expected_tensors(config, sites) | {name: tuple(p.shape) for name, p in saved.items()}
        layers_path = find_layer_stacks(base, config.towers).get("layers", ("",))[0]
        return expected, layers_path, ""
    except Exception as error:  # other libraries' code on settings from outside may raise anything
        return None, "", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def load_config(folder: Folder) -> tuple[Any, list[Problem]]:
    """Load the configuration with the classes of the remote code; None if they reject it."""
    from minilora_hub.remote_code.configuration_minilora import DoraConfig, MixLoraConfig

    file = "config.json"
    model_type = folder.config.get("model_type")
    classes: dict[Any, Any] = {"mixlora": MixLoraConfig, "dora": DoraConfig}
    if not isinstance(model_type, str) or model_type not in classes:
        message = f"model_type={model_type!r}: must be 'mixlora' or 'dora'"
        return None, [Problem("config", file, message, "save the adapter again")]
    problems = []
    try:
        config = classes[model_type].from_dict(dict(folder.config))
    except Exception as error:  # a damaged file can raise anything anywhere in transformers
        newer = "newer-format" if "format_version" in str(error) else "config"
        return None, [Problem(newer, file, f"does not load: {error}", "save the adapter again with this version")]
    if config.text_config is None:
        problems.append(Problem("config", file, "text_config is missing", "save the adapter again"))
    return config, problems


def _check_architectures(folder: Folder) -> Iterator[Problem]:
    known = {name.rpartition(".")[2] for kind in CLASS_PREFIXES for name in (own_auto_map(kind, HEADS) or {}).values()}
    known -= {f"{prefix}Config" for prefix in CLASS_PREFIXES.values()}
    architectures = folder.config.get("architectures")
    if not (isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in known):
        message = f"architectures={architectures!r}: must be a list with one of {sorted(known)}"
        yield Problem("config", "config.json", message, "save the adapter again")


def _check_values(
    folder: Folder, name: str, expected: Mapping[str, tuple[int, ...]] | None = None, in_peft: bool = False
) -> Iterator[Problem]:
    """Check that a file is readable, and its tensors floating-point, finite and those of `expected`, if given."""
    from safetensors import SafetensorError, safe_open

    path = folder.files.get(name)
    if path is None:
        return
    wrong: dict[str, list[str]] = {}
    trained = False
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if expected is not None:
                wrong["is missing"] = sorted(expected.keys() - names)
                wrong["does not belong to this configuration and base"] = sorted(names - expected.keys())
            if in_peft:
                surplus = sorted(tensor_name for tensor_name in names if not PEFT_TENSOR.fullmatch(tensor_name))
                wrong["is not a tensor of a LoRA or DoRA adapter"] = surplus
            for tensor_name in sorted(names):
                tensor = file.get_tensor(tensor_name)
                shape = (expected or {}).get(tensor_name)
                if shape is not None and tuple(tensor.shape) != tuple(shape):
                    message = f"has shape {tuple(tensor.shape)}, this configuration and base need {tuple(shape)}"
                    wrong.setdefault(message, []).append(tensor_name)
                if not tensor.is_floating_point():
                    wrong.setdefault(f"has dtype {tensor.dtype}, a floating-point one is needed", []).append(
                        tensor_name
                    )
                elif not _is_finite(tensor):
                    wrong.setdefault("holds values that are not finite", []).append(tensor_name)
                trained = trained or ("lora_B" in tensor_name and bool(tensor.any()))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        yield Problem("tensors", name, f"is not a readable safetensors file: {error}", RETRAIN)
        return
    for what, names_ in wrong.items():
        for tensor_name in names_[:SHOWN]:
            yield Problem("tensors", name, f"{tensor_name} {what}", RETRAIN)
        if len(names_) > SHOWN:
            yield Problem("tensors", name, f"{len(names_) - SHOWN} more: {what}", RETRAIN)
    if not names:
        yield Problem("tensors", name, "holds no tensor", RETRAIN)
    elif not trained and not any(wrong.values()):
        message = "every lora_B is zero: the adapter answers as the base does"
        yield Problem("untrained", name, message, "train it first", blocking=False)


def _is_finite(tensor: Any) -> bool:
    """Return whether no value is infinite or NaN."""
    import torch

    # torch has no `isfinite` for every 8-bit format.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def _check_peft(folder: Folder, prefix: str) -> Iterator[Problem]:
    """Check an adapter in PEFT's format: LoRA or DoRA, for the same base, with tensors of PEFT's names."""
    file = prefix + PEFT_CONFIG
    config = folder.json_files.get(file)
    if not isinstance(config, dict):
        if prefix and file not in folder.files:
            yield Problem("missing-file", file, "is missing", "build the folder again: minilora push does")
        return
    if config.get("peft_type") != "LORA":
        message = f"peft_type={config.get('peft_type')!r}: must be 'LORA', which is what stock PEFT reads"
        yield Problem("config", file, message, "save the adapter again")
    if config.get("auto_mapping"):
        yield Problem("auto-map", file, "auto_mapping is set: loading would import that class", "remove the entry")
    if prefix and config.get("base_model_name_or_path") != base_of(folder)[0]:
        message = f"base_model_name_or_path={config.get('base_model_name_or_path')!r} is not the base of config.json"
        yield Problem("config", file, message, "build the folder again: minilora push does")
    yield from _check_values(folder, prefix + WEIGHTS, in_peft=True)


def _check_same(folder: Folder, layers_path: str) -> Iterator[Problem]:
    """Check that `peft/` holds the same tensors as the root."""
    import torch
    from safetensors import SafetensorError, safe_open

    paths = [folder.files.get(WEIGHTS), folder.files.get(f"peft/{WEIGHTS}")]
    if None in paths or not layers_path:
        return
    try:
        with safe_open(paths[0], framework="pt") as root, safe_open(paths[1], framework="pt") as peft:
            translated = {from_peft(name, layers_path): name for name in peft.keys()}  # noqa: SIM118
            same = translated.keys() == set(root.keys()) and all(
                torch.equal(root.get_tensor(ours), peft.get_tensor(theirs)) for ours, theirs in translated.items()
            )
    except (SafetensorError, OSError, ValueError, RuntimeError):
        same = False
    if not same:
        message = f"its tensors are not those of {WEIGHTS}"
        yield Problem("tensors", f"peft/{WEIGHTS}", message, "build the folder again: minilora push does")
