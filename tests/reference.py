"""What ours is held against: PEFT, the `mixlora` package, and the equations written out."""

import json

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F


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


def reference_in_double(twin):
    """The model of `reference_mixlora` in float64, also where the package keeps a dtype or a tensor of its own."""
    modules = [*twin.double().modules()]
    blocks = [block for module in modules for block in vars(module).get("mixlora_moes", {}).values()]
    for part in (*modules, *blocks, *(expert for block in blocks for expert in block.experts_.values())):
        for name, value in [*vars(part).items()]:
            if value is torch.float32:
                setattr(part, name, torch.float64)
            elif isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(part, name, value.double())
        if isinstance(part, torch.nn.Module):
            part.double()
    return twin


# ---- routing, one token at a time ----


def plain_top_k(logits, k):
    """[(weight, expert)] of one token: the k most probable, divided by their sum."""
    weights, chosen = F.softmax(logits, dim=-1).topk(k)
    return list(zip(weights / weights.sum(), chosen.tolist(), strict=True))


def plain_top_p(logits, top_p, temperature=0.0):
    """[(weight, expert)] of one token, as `mixlora-dynamic` has it: until the sum exceeds top_p."""
    exponentials = logits.detach().double().exp()
    probabilities = (exponentials / exponentials.sum()).tolist()
    weights = F.softmax(logits, dim=-1) / (temperature or 1.0)
    chosen, total = [], 0.0
    for expert in sorted(range(len(probabilities)), key=lambda e: -probabilities[e]):
        chosen.append((weights[expert], expert))
        total += probabilities[expert] / (temperature or 1.0)
        if total > top_p:
            break
    return chosen


def plain_switch(logits, capacity=None, mask=None):
    """Per token of one sequence (probability, expert), as `mixlora-switch` has it in training; expert None: it passes.

    Padding (0 in `mask`) is served and takes no capacity.
    """
    served, decisions = [0] * logits.shape[-1], []
    for t, row in enumerate(logits):
        probabilities = F.softmax(row, dim=-1)
        expert = int(probabilities.argmax())
        real = mask is None or bool(mask[t])
        over = capacity is not None and real and served[expert] >= capacity
        served[expert] += real and not over
        decisions.append((probabilities[expert], None if over else expert))
    return decisions


def plain_balance(tokens, num_experts):
    """E * sum_i f_i P_i over tokens given as (probabilities, chosen experts)."""
    loss = 0.0
    for expert in range(num_experts):
        share = sum(expert in chosen for _, chosen in tokens) / len(tokens)
        probability = sum(probabilities[expert] for probabilities, _ in tokens) / len(tokens)
        loss = loss + share * probability
    return num_experts * loss


def plain_expert(module, e, row, masks=None, slot=None):
    """What expert e makes of one token, (d) -> (d), with materialised weights W + s B A (or DoRA's)."""
    block, structure = module.base_block, module.structure

    def project(name, rows):
        layer = block.get_submodule(name)
        if name not in module.experts:
            return layer(rows)
        update = module.experts[name]
        dropped = rows if masks is None else rows * masks[name][slot]
        product = update.scaling * update.lora_B[e] @ update.lora_A[e]
        weight = layer.weight if hasattr(layer, "in_features") else layer.weight.T  # GPT-2's is transposed
        bias = 0 if layer.bias is None else layer.bias
        out = rows @ weight.T + dropped @ product.T
        if update.magnitude is not None:
            out = out * (update.magnitude[e] / (weight + product).norm(dim=1))
        return out + bias

    projected = [project(name, row[None]) for name in structure.inputs]
    if len(projected) == 2:
        h = structure.activation(projected[0]) * projected[1]
    elif structure.gate_first is not None:
        gate, up = projected[0].chunk(2, dim=-1)
        h = structure.activation(gate) * up
    else:
        h = structure.activation(projected[0])
    return project(structure.output, h)[0]


def plain_mixture(module, x, masks=None, token_mask=None):
    """The block of the paper on one sequence (seq, d), one token and one expert at a time."""
    routing = module.routing
    logits = [module.router @ row for row in x]
    if type(routing).__name__ == "SwitchRouting":
        capacity = routing.capacity if module.training else None
        decisions = plain_switch(torch.stack(logits), capacity, token_mask)
        return torch.stack(
            [g * (row if e is None else plain_expert(module, e, row)) for (g, e), row in zip(decisions, x, strict=True)]
        )
    out = []
    for t, row in enumerate(x):
        if type(routing).__name__ == "TopPRouting":
            decisions = plain_top_p(logits[t], routing.top_p, routing.temperature)
        else:
            decisions = plain_top_k(logits[t], routing.k)
        out.append(sum(g * plain_expert(module, e, row, masks, (t, k)) for k, (g, e) in enumerate(decisions)))
    return torch.stack(out)
