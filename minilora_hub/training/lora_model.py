"""Plain LoRA for training: DoRA's modules without a magnitude, saved in PEFT's format.

It uses minilora_hub's modules rather than PEFT's, so that all methods of `OURS` share the initial weights of a seed,
the checkpoint format and the handling of quantised bases. Transformers reads PEFT's format, so a published LoRA needs
no remote code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import TaskType
from transformers import AutoModelForCausalLM
from transformers.generation import GenerationMixin

from minilora_hub.adapter_folder.names import PEFT_CONFIG, to_peft
from minilora_hub.formats.peft_experts import pack
from minilora_hub.remote_code.adapted_model import AdaptedModel
from minilora_hub.remote_code.adapter_files import ADAPTER_FILE, write_adapter
from minilora_hub.remote_code.base_structure import ExpertsSite, LinearSite
from minilora_hub.remote_code.configuration_minilora import AdapterConfig
from minilora_hub.remote_code.layer_stacks import find_decoder_layers
from minilora_hub.remote_code.linear_layers import linear_shape, whole_tensor
from minilora_hub.remote_code.modeling_minilora import GenerateOnBase
from minilora_hub.remote_code.trainer_support import takes_base_arguments

LEAVES = ("lora_A", "lora_B")


class LoraConfig(AdapterConfig):
    """Configuration of a LoRA that is being trained; it is saved as PEFT's LoraConfig."""

    model_type = "minilora_lora"

    def __init__(self, r: int = 16, **kwargs: Any) -> None:
        super().__init__(r=r, **kwargs)  # type: ignore[no-untyped-call]


class LoraForCausalLM(GenerateOnBase, AdaptedModel, GenerationMixin):
    """A causal language model with a LoRA adapter (arXiv 2106.09685) in it."""

    config_class = LoraConfig
    auto_class = AutoModelForCausalLM

    @takes_base_arguments
    def forward(self, input_ids: Any = None, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Call the base with the adapter in it: same arguments, same outputs."""
        kwargs = kwargs if labels is None else {**kwargs, "labels": labels}
        return self.base(**self._base_arguments(input_ids, args, kwargs))

    @classmethod
    def _refused_linears(cls, base: Any) -> dict[str, str]:
        """Return the linears that PEFT does not support, since PEFT must be able to load the saved adapter."""
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

        refused = _taken_for_experts(base)
        for path, _ in base.named_modules():
            try:
                _check_lora_target_modules_mamba(PeftLoraConfig(), base, path.rpartition(".")[2])
            except ValueError:
                refused[path] = "a LoRA is saved in PEFT's format, and PEFT does not support it on this kind of base"
        return refused

    def save_pretrained(  # type: ignore[override]  # as on `AdaptedModel`
        self,
        save_directory: Any,
        state_dict: Any = None,
        push_to_hub: Any = False,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write adapter_config.json, the tensors under PEFT's names, and the tokenizer.

        Args:
            save_directory: the folder, made if missing.
            state_dict: not used: the current weights are written.
            push_to_hub: not used: `minilora push` publishes.
            tokenizer: saved beside it, where given.
            **kwargs: not used.

        Raises:
            ValueError: the base's weights are not those of the named base, or the tokenizer has more tokens than the
                base. Nothing is written then.
        """
        self._check_before_saving(state_dict, tokenizer)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        layers_path, _ = find_decoder_layers(self.base)
        values: dict[str, Any] = {}
        for name, value in self.adapter_parameters().items():
            values[name] = whole_tensor(value).detach().cpu()
        stacked = [site for site in self.sites if isinstance(site, ExpertsSite)]
        of_experts = {f"{site.name}.{name}.{leaf}" for site in stacked for name, *_ in site.targets for leaf in LEAVES}
        tensors = {to_peft(name, layers_path): value for name, value in values.items() if name not in of_experts}
        for site in stacked:
            tensors |= pack(site, self._base_layer(site.path), values)
        write_adapter(folder / ADAPTER_FILE, tensors)
        (folder / PEFT_CONFIG).write_text(self._peft_config(), encoding="utf-8")
        self.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _peft_config(self) -> str:
        ours = self.config
        paths = [site.path for site in self.sites if isinstance(site, LinearSite)]
        names = sorted({path.rpartition(".")[2] for path in paths})
        # Last parts of the paths, unless a linear elsewhere has the same.
        others = {path for path, _ in self.base.named_modules() if path.rpartition(".")[2] in names}
        plain = {path.removesuffix(".base_layer") for path in others} == set(paths)
        settings = PeftLoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=ours.r,
            lora_alpha=ours.lora_alpha,
            # PEFT refuses one on parameters, also where it has no effect, as in evaluation.
            lora_dropout=0.0 if ours.target_parameters else ours.lora_dropout,
            target_parameters=ours.target_parameters or None,
            use_rslora=ours.use_rslora,
            target_modules=names if plain else sorted(paths),
            rank_pattern=ours.rank_pattern,
            alpha_pattern=ours.alpha_pattern,
            fan_in_fan_out=any(type(self._base_layer(path)).__name__ == "Conv1D" for path in paths),
            base_model_name_or_path=ours.base_model_name_or_path,
            revision=ours.base_model_revision,
            inference_mode=True,
        )
        fields = {name: getattr(value, "value", value) for name, value in settings.to_dict().items()}
        ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
        return json.dumps(ordered | {"auto_mapping": None}, indent=2, sort_keys=True) + "\n"

    def _base_layer(self, path: str) -> Any:
        return self.base.get_submodule(path).base_layer


def _taken_for_experts(base: Any) -> dict[str, str]:
    """Return the linears whose names PEFT takes for experts of a checkpoint of transformers 4, and rewrites.

    On DeepSeek-V3, it reads ``gate_proj`` as the stacked experts, although the dense layers have a linear of this name.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    paths = [path for path, module in base.named_modules() if linear_shape(module)]
    taken = set()
    for leaf in {path.rpartition(".")[2] for path in paths}:
        config = PeftLoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, base, None)
        except ValueError:  # it is one of several that are stacked in one parameter
            taken.add(leaf)
        if leaf not in (config.target_modules or ()):
            taken.add(leaf)
    reason = "a LoRA is saved in PEFT's format, and PEFT takes this name for that of the stacked experts"
    return {path: reason for path in paths if path.rpartition(".")[2] in taken}
