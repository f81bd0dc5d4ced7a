"""A run that kills itself with SIGKILL at a given place: python killed_run.py WHERE OUT {settings as JSON}."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from minilora_hub.training import adapter_checkpoints as module
from minilora_hub.training.callbacks import GradientsChecked
from minilora_hub.training.run import train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(where: str, out: str, said: dict) -> None:
    kind, _, number = where.partition(":")
    if kind == "step":

        class Killed(GradientsChecked):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == int(number):
                    die()

        import minilora_hub.training.callbacks

        minilora_hub.training.callbacks.GradientsChecked = Killed
    elif kind == "result":
        from minilora_hub.training import outputs

        outputs.write_loss = lambda *_: die()
    else:
        # In the middle of the second checkpoint: of its weights, or of its optimizer's state.
        seen = []
        write, save = module.write_adapter, torch.save

        def half_weights(path, tensors):
            seen.append(path)
            if kind == "weights" and len(seen) == 2:
                path.write_bytes(b"half")
                die()
            write(path, tensors)

        def half_state(state, path, *args, **kwargs):
            if kind == "optimizer" and len(seen) == 2 and str(path).endswith("optimizer.pt"):
                with open(path, "wb") as file:
                    file.write(b"half")
                die()
            save(state, path, *args, **kwargs)

        module.write_adapter, torch.save = half_weights, half_state
    train(out, **said)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
