"""What client and server write into Flower's messages, and read from them."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from minilora_hub.training.federated import Answer

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"
ROWS, STEPS, LOSS = "num-examples", "steps", "train-loss"


def answer_record(answer: Answer) -> RecordDict:
    """Return a client's answer as a message's content."""
    metrics = MetricRecord({ROWS: answer.rows, STEPS: answer.steps, LOSS: answer.loss})
    return RecordDict({ARRAYS: ArrayRecord(answer.tensors), METRICS: metrics})


def answer_of(content: RecordDict) -> Answer:
    """Read what `answer_record` wrote."""
    metrics: Any = content.metric_records[METRICS]
    tensors = content.array_records[ARRAYS].to_torch_state_dict()
    return Answer(dict(tensors), int(metrics[ROWS]), int(metrics[STEPS]), float(metrics[LOSS]))
