"""What happens between steps: progress on stderr, a stop on signals, a look at the gradients before they are used."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from minilora_hub.errors import TrainingError

LINES = 20
"""How many lines a run prints where there is no terminal."""


class ProgressShown(TrainerCallback):
    """A bar with loss, tokens per second and the time left; a line now and then where stderr is no terminal."""

    def __init__(self, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown, highlight=False)
        self._bar: Progress | None = None
        self._shown = shown
        self.loss = float("nan")
        self._validated = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._first, self._tokens = time.perf_counter(), state.global_step, state.num_input_tokens_seen
        if not self._shown or not state.is_world_process_zero:
            return
        if self._console.is_terminal:
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("Training"), *columns, *times, console=self._console)
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, facts="")
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" in logs:
            self._validated = f"  validation {logs['eval_loss']:.4f}"
        if "loss" not in logs or not self._shown or not state.is_world_process_zero:
            return
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = (state.num_input_tokens_seen - self._tokens) / seconds
        facts = f"loss {self.loss:.4f}{self._validated}  {rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, facts=facts)
        elif state.global_step % max(1, state.max_steps // LINES) == 0 or state.global_step == state.max_steps:
            done = max(state.global_step - self._first, 1)
            left = seconds / done * (state.max_steps - state.global_step)
            print(f"step {state.global_step}/{state.max_steps}  {facts}  {left:.0f} s left", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen's live region; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class GradientsChecked(TrainerCallback):
    """Stops before an optimizer step whose gradients are not finite: the weights stay as they were."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if grads and not all(torch.stack([_local(grad).isfinite().all() for grad in grads]).tolist()):
            raise TrainingError(self.trainer.not_finite_gradients())


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class StoppedBySignal(TrainerCallback):
    """Ctrl-C and SIGTERM save a checkpoint after the step that runs, and stop; a second Ctrl-C stops at once.

    with StoppedBySignal() as stop:      # as a callback of the trainer, too
        trainer.train()
    stop.number                          # the signal, or None
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StoppedBySignal:
        """Listen; only a program's main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        number = self._agreed(args)
        if number is not None and state.global_step < state.max_steps:
            self.number = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def _agreed(self, args: Any) -> int | None:
        """The signal that any process has heard: all must stop after the same step, or they wait for each other."""
        if args.world_size <= 1:
            return self.number
        heard = torch.tensor(self.number or 0, device=args.device)
        torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
        return int(heard) or None
