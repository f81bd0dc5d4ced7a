"""Two processes whose routers are forced: what each of them does.

Process 0 sends every token to experts 0 and 1, process 1 to experts 1 and 2; nobody ever takes expert 3. Each process
writes what it ends with.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from minilora_hub.remote_code import routing
from minilora_hub.training import run as run_module


def forced_routing(out: Path, said: dict) -> None:
    rank = int(os.environ["RANK"])

    def forced(logits, k):
        weights = torch.softmax(logits, dim=-1)[:, rank : rank + k]
        selected = torch.arange(rank, rank + k).expand(len(logits), k)
        return weights / weights.sum(dim=-1, keepdim=True), selected.contiguous()

    routing.route_top_k = forced
    before = run_module._train

    def noticed(trainer, *args):
        seconds = before(trainer, *args)
        tensors = {name: value.detach().clone() for name, value in trainer.model.adapter_parameters().items()}
        save_file(tensors, out.parent / f"process{rank}.safetensors")
        return seconds

    run_module._train = noticed
    run_module.train(out, **said)
