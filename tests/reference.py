"""The independent implementations that ours is held against: PEFT, and the `mixlora` package."""

import json

import torch
from peft import LoraConfig, get_peft_model


def peft_twin(base, model, config):
    """The same adapter in PEFT. Takes over `base`."""
    settings = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora, "lora_dropout": 0.0}
    targets = config.target_modules
    peft_config = LoraConfig(
        **settings,
        target_modules="all-linear" if targets == "all-linear" else list(targets),
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    twin = get_peft_model(base, peft_config).eval()
    ours = dict(model)
    names = {".lora_A.default.weight": "lora_A", ".lora_B.default.weight": "lora_B"}
    names[".lora_magnitude_vector.default.weight"] = "magnitude"
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            for ending, leaf in names.items():
                if name.endswith(ending):
                    path = name[name.index("layers.") :].removesuffix(ending)
                    parameter.copy_(ours.pop(f"{path}.{leaf}"))
    assert not ours, f"PEFT has no counterpart of {list(ours)[:3]}"
    return twin


def reference_mixlora(base, model, folder):
    """The same adapter, run by the `mixlora` package with its dropout forced to 0. Takes over `base`."""
    from mixlora.model import inject_adapter_in_model, load_adapter_weights

    config, text_config = model.config, base.config
    activation = getattr(text_config, "hidden_activation", None) or text_config.hidden_act
    lora = {"r": config.r, "lora_alpha": int(config.lora_alpha), "lora_dropout": 0.1}  # it refuses 0
    fields = {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "bias": "none",
        "routing_strategy": "mixlora",
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "act_fn": activation,
        "target_modules": sorted({name.split(".")[-2] for name in model.adapter_parameters() if "lora_A" in name}),
        **lora,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    weights = {}
    for name, tensor in model.adapter_parameters().items():
        layer, *path, leaf = name.removeprefix("layers.").split(".")
        prefix = f"mixlora.layers.{layer}.{path[0]}"
        if leaf == "router":
            weights[f"{prefix}.moe_gate.weight"] = tensor.detach()
        elif "experts" in path:
            for expert, value in enumerate(tensor.detach()):
                weights[f"{prefix}.{path[2]}.experts.{expert}.{leaf}.weight"] = value.clone()
        else:
            weights[f"{prefix}.{path[1]}.{leaf}.weight"] = tensor.detach()
    torch.save(weights, folder / "adapter_model.bin")
    reference_config, weights = load_adapter_weights(str(folder), device="cpu")
    twin = base
    inject_adapter_in_model(twin, reference_config, weights)
    # Its experts live in plain dicts, which eval() does not reach: their dropout is switched off one by one.
    blocks = [block for module in twin.modules() for block in vars(module).get("mixlora_moes", {}).values()]
    assert len(blocks) == len(twin.model.layers)
    for module in (*twin.modules(), *(expert for block in blocks for expert in block.experts_.values())):
        if type(module).__name__ == "LoraLinear":
            module.dropout_.p = 0.0
    return twin
