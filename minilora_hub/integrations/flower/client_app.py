"""The client: continues from the server's adapter on its own rows, and sends back the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from logging import ERROR
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from minilora_hub.errors import DataError, TrainingError
from minilora_hub.integrations.flower.messages import ARRAYS, CONFIG, answer_record
from minilora_hub.training.federated import train_client

CLIENT = "{client}"

app = ClientApp()


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Answer a round."""
    content: Any = message.content
    config = content.config_records[CONFIG]
    try:
        with TemporaryDirectory(prefix="minilora-rows-") as scratch:
            answer = train_client(
                content.array_records[ARRAYS].to_torch_state_dict(),
                {name: config[name] for name in ("settings", "documents")},
                rows_of(context.node_config, context.run_config, Path(scratch)),
                config["server-round"],
                context.node_config.get("base"),
            )
    except Exception as error:  # Flower sends its message to the server, and it may quote a row
        log(ERROR, "the round failed", exc_info=error)
        raise TrainingError(f"{type(error).__name__}: its message is in this client's log") from None
    return Message(answer_record(answer), reply_to=message)


def rows_of(node: Mapping[str, Any], run: Mapping[str, Any], scratch: Path) -> str:
    """Return the file of a client's rows.

    Args:
        node: the client's own configuration. Its ``data`` is used where it has one; in a simulation it has the number
            of the client and how many there are.
        run: the run's configuration. In its ``data``, ``{client}`` stands for the number; without it, a JSONL file is
            dealt out to all clients, row by row.
        scratch: folder for a client's part.

    Raises:
        DataError: neither names rows for this client.
    """
    if data := node.get("data"):
        return str(data)
    data, client = str(run.get("data", "")), node.get("partition-id")
    if client is None:
        raise DataError("""this client has no rows: start it with --node-config 'data="/path/to/rows.jsonl"'""")
    if CLIENT in data:
        return data.replace(CLIENT, str(client))
    whole = Path(data).expanduser()
    if whole.suffix != ".jsonl":
        raise DataError(f"data={data!r}: only a .jsonl file can be dealt out; name one file a client with {CLIENT}")
    try:
        with whole.open(encoding="utf-8-sig", newline="\n") as file:  # a text may hold other ends of lines
            lines = [line for line in file if line.strip()]
    except OSError as error:
        raise DataError(f"data={data!r}: cannot be read ({error.strerror or error})") from error
    part = scratch / f"client-{client}.jsonl"
    part.write_text("".join(lines[int(client) :: int(node["num-partitions"])]), encoding="utf-8", newline="\n")
    return str(part)
