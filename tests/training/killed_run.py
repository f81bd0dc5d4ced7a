"""Runs that end before they are done, for processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from minilora_hub.training import adapter_checkpoints as module
from minilora_hub.training import trainer
from minilora_hub.training.callbacks import GradientsChecked
from minilora_hub.training.run import train
from minilora_hub.training.sweep import sweep


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(where: str, out: str, said: dict) -> None:
    """A run that kills itself with SIGKILL at a given place."""
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


def split_run(part: str, out: str, said: dict) -> None:
    """A run that ends after its first checkpoint, or is resumed; the bytes of the base go to a file beside it."""
    save = trainer.AdapterTrainer._save_checkpoint

    def save_and_die(self, *arguments):
        save(self, *arguments)
        os._exit(9)

    def plan_made(plan, settings):
        with open(out + ".bytes", "w") as file:
            file.write(str(plan.base_bytes))

    if part == "first":
        trainer.AdapterTrainer._save_checkpoint = save_and_die
    train(out, record=False, on_plan=plan_made, **({"resume": True} if part == "second" else said))


def killed_sweep(out: Path, vary: dict, said: dict) -> None:
    """A sweep that kills itself as the first checkpoint of the trial with 0.01 is saved."""
    save = trainer.AdapterTrainer._save_checkpoint

    def save_or_die(self, *arguments):
        if "0.01" in str(self.run_dir):
            die()
        save(self, *arguments)

    trainer.AdapterTrainer._save_checkpoint = save_or_die
    sweep(out, vary, **said)
