"""Federated training without its transport: what a round computes, what a client accepts, the folder that results."""

from __future__ import annotations

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import colour_rows, write_base, write_rows

from minilora_hub.adapter_folder.results import Results
from minilora_hub.errors import TrainingError
from minilora_hub.publish.push.build import build
from minilora_hub.training.federated import FederatedServer, train_client
from minilora_hub.training.run import train

SHORT = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "r": 4, "save_every": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Rows of two clients, twice as many of the first."""
    folder = tmp_path_factory.mktemp("shards")
    rows = colour_rows()
    return [
        str(write_rows(folder / f"{part}.jsonl", rows[start:end]))
        for part, (start, end) in enumerate([(0, 16), (16, 24)])
    ]


@pytest.fixture
def serve(tmp_path):
    """A function that makes a server whose folder is `out`."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(FederatedServer(tmp_path / "out", **settings))


def run(server, shards, rounds=1):
    """Every client's answers in the last round."""
    for number in range(1, rounds + 1):
        tensors = server.tensors()
        answers = [train_client(tensors, server.sent, shard, number) for shard in shards]
        server.add_round(answers, len(shards))
    return answers


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "mixdora"])
def test_a_round_is_numpys_mean_of_what_the_clients_trained(method, base, shards, serve, tmp_path):
    server = serve(method=method, base=base, **SHORT, **({"num_experts": 2} if method == "mixdora" else {}))
    before = server.tensors()
    answers = run(server, shards)
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [answer.rows for answer in answers] == [16, 8]
    assert all(answer.tensors.keys() == before.keys() == after.keys() for answer in answers)

    def weighted(parts):
        return np.average([part.double().numpy() for part in parts], axis=0, weights=[16, 8])

    changed = 0
    for name, tensor in after.items():
        if "lora_A" not in name and "lora_B" not in name:  # magnitudes and routers
            expected = weighted([answer.tensors[name] for answer in answers])
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=1e-6)
            changed += not torch.equal(tensor, before[name])
        if "lora_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        exact = weighted([answer.tensors[other].double() @ answer.tensors[name].double() for answer in answers])
        ours = (after[other].double() @ tensor.double()).numpy()
        for matrix, product in zip(
            exact.reshape(-1, *exact.shape[-2:]), ours.reshape(-1, *exact.shape[-2:]), strict=True
        ):
            u, s, vh = np.linalg.svd(matrix, full_matrices=False)
            np.testing.assert_allclose(product, (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=1e-6)
    assert changed == sum("lora_" not in name for name in after)


@pytest.mark.slow
def test_the_result_is_an_adapter_folder_whose_card_says_how(base, shards, serve, tmp_path):
    out = tmp_path / "out"
    server = serve(method="mixlora", num_experts=2, base=base, **SHORT)
    assert not out.exists()
    run(server, shards, rounds=2)
    assert server.finish() == ()
    results = Results.load(out)
    said = results.training.hyperparameters
    assert (said["federated rounds"], said["clients in each round"]) == (2, "2 of 2, 2 of 2")
    residuals = [float(text) for text in said["relative residual of the SVD in each round"].split(", ")]
    assert len(residuals) == 2
    assert all(0 < residual < 1 for residual in residuals)
    assert [step for step, _ in results.training.loss] == [2, 4]
    built = build(out, tmp_path / "built", repo_id="me/federated", base_id="org/base", base_model=base)
    card = (built.folder / "README.md").read_text(encoding="utf-8")
    assert "| Federated rounds | 2 |" in card
    assert "**rows of the clients**: 24 items" in card
    names = {path.name for path in out.rglob("*")}
    assert not names & {"training.yaml", "checkpoints", "loss.csv", "run.json", "0.jsonl"}
    assert not any("Item 1?" in path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    # A training goes on from it.
    train(tmp_path / "on", from_adapter=str(out), data=shards[0], record=False, max_steps=1, progress=False)
    assert Results.load(tmp_path / "on").training.parent.adapter == "out"


@pytest.mark.slow
def test_it_continues_from_an_adapter_and_only_a_part_learns(base, shards, serve, tmp_path):
    """What no client trained stays as it was, to the byte."""
    train(tmp_path / "parent", method="mixlora", base=base, data=shards[0], record=False, **SHORT, num_experts=2)
    said = {"learn": "router", "learning_rate": 1e-2, "max_steps": 2, "batch_size": 4}
    server = serve(from_adapter=str(tmp_path / "parent"), **said)
    run(server, shards)
    parent, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parent", "out"))
    assert {name for name in parent if not torch.equal(parent[name], after[name])} == {
        n for n in parent if ".router" in n
    }
    assert server.rounds[0].residual == 0
    assert Results.load(tmp_path / "out").training.parent.learned == "router"


@pytest.mark.slow
def test_a_client_with_another_base_is_refused(base, shards, serve, tmp_path):
    other = write_base(tmp_path / "other", seed=1)
    server = serve(method="lora", base=base, **SHORT)
    with pytest.raises(TrainingError, match="trained on a base with fingerprint sha256:"):
        train_client(server.tensors(), server.sent, shards[0], 1, str(other))


def test_a_server_cannot_choose_what_a_client_reads(base, shards, serve, tmp_path):
    server = serve(method="lora", base=base, **SHORT)
    sent = server.sent | {"settings": json.dumps({"validation_data": ["/etc/passwd"], "seed": 0})}
    with pytest.raises(TrainingError, match=r"validation_data=.*: not a setting that a server chooses"):
        train_client(server.tensors(), sent, shards[0], 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pissa"}, "method='pissa' in a federated training: must be one of lora, dora, mixlora, mixdora"),
        ({"save_dtype": "bfloat16"}, "save_dtype='bfloat16' in a federated training: must be float32"),
        ({"validation": 0.2}, "validation=0.2 in a federated training: leave it out"),
        ({"data_revision": "main"}, "data_revision='main' in a federated training: leave it out"),
        ({"objective": ["distill:teacher=x"]}, "in a federated training: leave it out"),
        ({"method": None}, "method=None: must be one of"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message, base, serve, tmp_path):
    with pytest.raises(TrainingError, match=message):
        serve(**{"method": "lora", "base": base} | SHORT | settings)
    assert not (tmp_path / "out").exists()


def test_an_answer_that_does_not_fit_is_refused(base, shards, serve, tmp_path):
    server = serve(method="lora", base=base, **SHORT)
    answer = train_client(server.tensors(), server.sent, shards[0], 1)
    name = next(iter(answer.tensors))
    whole = answer.tensors.pop(name)
    with pytest.raises(ValueError, match="the answer of client 0 does not fit"):
        server.add_round([answer], 1)
    answer.tensors[name] = whole.half()
    with pytest.raises(ValueError, match=r"the answer of client 0: .* is torch.float16, must be torch.float32"):
        server.add_round([answer], 1)
    assert not (tmp_path / "out").exists()
