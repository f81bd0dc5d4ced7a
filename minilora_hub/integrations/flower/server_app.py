"""The server: Flower's FedAvg with the mean of the clients' updates in place of the mean of A and B."""

from __future__ import annotations

from collections.abc import Iterable
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from minilora_hub.errors import TrainingError
from minilora_hub.integrations.flower.messages import ARRAYS, ROWS, answer_of
from minilora_hub.training.federated import FederatedServer

OWN_KEYS = {"num-server-rounds", "num-clients", "data", "out", "config", "from"}
"""Keys of the run's configuration that are not settings of the training."""

app = ServerApp()


class MeanOfUpdates(FedAvg):
    """FedAvg that averages whole updates B A; see `formats.averaging`.

    Args:
        server: holds the adapter.
        clients: each round waits until so many are connected, and asks all that are.
    """

    def __init__(self, server: FederatedServer, clients: int) -> None:
        super().__init__(
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
            weighted_by_key=ROWS,
            arrayrecord_key=ARRAYS,
        )
        self.server, self.asked = server, clients

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every connected client for a round."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.asked = len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Save the mean of the clients' adapters and return it.

        Raises:
            TrainingError: no client answered.
        """
        replies = list(replies)
        # FedAvg's own logs who failed, checks what arrived, and averages the metrics. Its mean of A and B is not used.
        _, metrics = super().aggregate_train(server_round, replies)
        answers = [answer_of(reply.content) for reply in replies if reply.has_content()]
        # The last line: Flower's reason contains the client's traceback.
        failed = [reply.error.reason.strip().splitlines()[-1] for reply in replies if reply.has_error()]
        for reason in failed:
            log(WARNING, "round %s: a client failed, and is not in the mean: %s", server_round, reason)
        if not answers or metrics is None:
            raise TrainingError(f"round {server_round}: no client answered{''.join(f'; {one}' for one in failed[:3])}")
        means = self.server.add_round(answers, self.asked)
        done = self.server.rounds[-1]
        log(
            INFO,
            "round %s: %s of %s clients, %s rows, loss %.4f, relative residual of the mean's SVD %.3g",
            server_round,
            done.clients,
            done.asked,
            done.rows,
            done.loss,
            done.residual,
        )
        metrics["residual"] = done.residual
        return ArrayRecord(means), metrics


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; the folder `out` holds the result."""
    run = {name: value for name, value in context.run_config.items() if value != ""}
    for name in ("num-server-rounds", "num-clients"):
        count = run.get(name)
        if type(count) is not int or count < 1:
            raise TrainingError(f"{name}={count!r}: must be a whole number of at least 1")
    for name in ("out", "config", "data"):  # Flower runs an app in a folder of its own
        if (name == "out" or name in run) and not Path(str(run.get(name, ""))).expanduser().is_absolute():
            raise TrainingError(f"{name}={str(run.get(name, ''))!r}: must be an absolute path")
    given = {name: value for name, value in run.items() if name not in OWN_KEYS}
    with FederatedServer(str(run["out"]), run.get("config"), from_adapter=run.get("from"), **given) as server:
        MeanOfUpdates(server, int(run["num-clients"])).start(
            grid,
            ArrayRecord(server.tensors()),
            num_rounds=int(run["num-server-rounds"]),
            train_config=ConfigRecord(server.sent),
        )
        for note in server.finish():
            log(WARNING, note)
    log(INFO, "The adapter is in %s", server.out)
