"""What is shown while a training runs."""

from types import SimpleNamespace

from minilora_hub.training import callbacks
from minilora_hub.training.callbacks import ProgressShown


def test_the_rate_is_of_the_steps_and_a_validation_is_shown_with_its_step(monkeypatch, capsys):
    """Two steps of 100 tokens in two seconds each; between them the validation takes a minute."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock.now)
    shown = ProgressShown(True)
    state = SimpleNamespace(max_steps=2, global_step=0, num_input_tokens_seen=50)
    shown.on_train_begin(None, state, None)
    for step, loss, validation in ((1, 2.0, 3.0), (2, 1.0, 1.5)):
        shown.on_step_begin(None, state, None)
        clock.now += 2
        state.global_step, state.num_input_tokens_seen = step, 50 + 100 * step
        control = SimpleNamespace(should_evaluate=True)
        shown.on_log(None, state, control, {"loss": loss})
        clock.now += 60
        shown.on_log(None, state, control, {"eval_loss": validation})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("tokens/s")[0] for line in lines] == [
        "step 1/2  loss 2.0000  validation 3.0000  50 ",
        "step 2/2  loss 1.0000  validation 1.5000  50 ",
    ]
