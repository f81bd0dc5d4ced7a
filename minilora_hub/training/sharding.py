"""Split a model over the processes of a run with FSDP2, so that none holds all of it, and gather what is saved.

Checkpoints hold whole tensors, those of the optimizer too: a run can be resumed by another number of processes.
"""

from __future__ import annotations

from typing import Any

from minilora_hub.remote_code.linear_layers import is_split, whole_tensor


def shard(model: Any) -> None:
    """Split an adapted model over the processes, in place, a layer at a time; each layer is whole while it computes.

    The parameters stay on the processes' devices; those of a base on the CPU are moved there in parts.
    """
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from minilora_hub.remote_code.layer_stacks import find_layer_stacks

    state = PartialState()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for _, layers in find_layer_stacks(model.base, model.config.towers).values():
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._is_accelerate_prepared = True  # or accelerate would replicate it


def own_part(tensor: Any) -> Any:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if is_split(tensor) else tensor


def split_like(tensor: Any, parameter: Any) -> Any:
    """Split a whole tensor as a parameter is split."""
    from torch.distributed.tensor import distribute_tensor

    if not is_split(parameter):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def gather_adapter(model: Any) -> None:
    """Make the adapter's tensors whole again, on every process. The model cannot compute afterwards."""
    from torch import nn

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in model.adapter_parameters().values():
        path, _, leaf = names[id(parameter)].rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(whole_tensor(parameter.detach())))


def keep_states_whole(optimizer: Any) -> None:
    """Have an optimizer return and take whole states. All processes must ask for them."""

    def gathered(optimizer: Any, content: dict[str, Any]) -> dict[str, Any]:
        states = {key: {n: whole_tensor(v) for n, v in state.items()} for key, state in content["state"].items()}
        return content | {"state": states}

    def divided(optimizer: Any, content: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def part(value: Any, parameter: Any) -> Any:
            fits = getattr(value, "shape", None) == parameter.shape
            return split_like(value, parameter) if fits else value

        states = {k: {n: part(v, parameters[k]) for n, v in state.items()} for k, state in content["state"].items()}
        return content | {"state": states}

    optimizer.register_state_dict_post_hook(gathered)
    optimizer.register_load_state_dict_pre_hook(divided)
