"""Trainer callbacks: progress on stderr, stopping on signals, and a check for non-finite gradients."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from minilora_hub.errors import TrainingError
from minilora_hub.progress_display import ProgressDisplay
from minilora_hub.remote_code.linear_layers import is_split
from minilora_hub.training.sharding import own_part


class ProgressShown(TrainerCallback):
    """Shows steps, loss and tokens per second of the steps alone: validation and checkpoints are not counted.

    A step that is validated is shown once its validation loss is known.

    Args:
        shown: whether this process shows anything.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._display: ProgressDisplay | None = None
        self._facts = self._validated = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds, self._tokens = 0.0, state.num_input_tokens_seen
        steps = {"total": state.max_steps, "done": state.global_step}
        self._display = ProgressDisplay("Training", "step", shown=self._shown, **steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:  # reading it has waited for the device, so the step is over
            self._seconds += time.perf_counter() - self._began
            rate = (state.num_input_tokens_seen - self._tokens) / max(self._seconds, 1e-9)
            self._facts = f"loss {logs['loss']:.4f}{{}}  {rate:,.0f} tokens/s"
            if not control.should_evaluate:
                self._show(state)
        elif "eval_loss" in logs:
            self._validated = f"  validation {logs['eval_loss']:.4f}"
            self._show(state)

    def _show(self, state: Any) -> None:
        if self._display and self._facts:
            self._display.update(state.global_step, self._facts.format(self._validated))

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._display:
            self._display.close()


class GradientsChecked(TrainerCallback):
    """Stops before an optimizer step with non-finite gradients, so that the weights are not changed."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        finite = torch.stack([own_part(grad).isfinite().all() for grad in grads]).all() if grads else torch.tensor(True)
        if any(map(is_split, grads)):  # each process has a part: all must stop at the same step
            finite = finite.float()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not finite:
            raise TrainingError(self.trainer.not_finite_gradients())


class StoppedBySignal(TrainerCallback):
    """Saves a checkpoint and stops after the current step on Ctrl-C or SIGTERM; a second Ctrl-C stops at once.

    with StoppedBySignal() as stop:      # also a callback of the trainer
        trainer.train()
    stop.number                          # the signal, or None
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StoppedBySignal:
        """Install the signal handlers, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        number = self._on_any_process(args)
        if number is not None and state.global_step < state.max_steps:
            self.number = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def _on_any_process(self, args: Any) -> int | None:
        """Return the signal that any process received, since all must stop after the same step to avoid a deadlock."""
        if args.world_size <= 1:
            return self.number
        received = torch.tensor(self.number or 0, device=args.device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received) or None
