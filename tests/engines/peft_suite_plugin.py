"""A pytest plugin for PEFT's own tests: the Hub's models are local, MIXLORA is registered or not, and has cases.

Used by `peft_suite.py`, which says what it is for. Its options: ``--minilora absent`` leaves PEFT as it is;
``registered`` calls `minilora_hub.register()`; ``cases`` also adds MIXLORA to the cases of the tests of decoder models
and custom models, and leaves all others out. ``--outcomes FILE`` writes one JSON line per test: [node id, outcome,
reason].
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

CUSTOM_MODEL = "MixLoraDecoder"

DECODER_CASES: dict[str, dict[str, Any]] = {
    "default": {"target_modules": None},
    "trainable tokens": {"target_modules": None, "trainable_token_indices": [0, 1, 3]},
    "dora": {"target_modules": None, "use_dora": True},
}
"""Configurations that run on each of the decoder models of PEFT's tests."""

BLOCK = ["gate_proj", "up_proj", "down_proj"]
CUSTOM_CASES: dict[str, dict[str, Any]] = {
    "all linears": {"target_modules": "all-linear"},
    "projections": {"target_modules": BLOCK},
    "one projection": {"target_modules": ["down_proj"]},
    "block": {"target_modules": ["mlp"]},
    "regular expression": {"target_modules": r".*\.layers\.\d+\.mlp"},
    "attention and block": {"target_modules": ["q_proj", "v_proj", "mlp"]},
    "one layer": {"target_modules": [*BLOCK, "q_proj"], "layers_to_transform": [1]},
    "top-p": {"target_modules": BLOCK, "routing_strategy": "mixlora-dynamic"},
    "switch": {"target_modules": BLOCK, "routing_strategy": "mixlora-switch", "jitter_noise": 0.0},
    "dora": {"target_modules": ["q_proj", *BLOCK], "use_dora": True},
    "rslora and patterns": {"target_modules": BLOCK, "use_rslora": True, "rank_pattern": {"up_proj": 2}},
    "modules to save": {"target_modules": BLOCK, "modules_to_save": ["classifier"]},
    "trainable tokens": {"target_modules": BLOCK, "trainable_token_indices": {"embed_tokens": [0, 1, 3]}},
}
"""Configurations that run on `MixLoraDecoder` in PEFT's tests of custom models."""


class MixLoraDecoder(nn.Module):
    """A model outside of transformers' classes, with decoder layers that a MixLoRA finds: token ids -> classes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.2,
            name_or_path=CUSTOM_MODEL,
        )
        self.name_or_path = CUSTOM_MODEL  # which PEFT writes into an adapter's configuration
        self.decoder = LlamaModel(self.config)
        self.classifier = nn.Linear(16, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.decoder(X.long()).last_hidden_state.mean(dim=1)).log_softmax(dim=-1)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--minilora", choices=("absent", "registered", "cases"), default="absent")
    parser.addoption("--outcomes", help="where to write one JSON line per test")


def pytest_sessionstart(session: Any) -> None:
    mode = session.config.getoption("--minilora")
    utils = importlib.import_module("tests.testing_utils")
    utils._HUB_MODEL_ACCESSES = _EveryModelIsThere()
    if mode == "absent":
        return
    import minilora_hub

    minilora_hub.register()
    if mode == "cases":
        _add_cases(utils)


class _EveryModelIsThere(dict):
    """Counts of downloads in which every model has been downloaded before, so that the tests stay offline."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def _add_cases(utils: Any) -> None:
    from minilora_hub import MixLoraPeftConfig

    ordinary = utils.set_init_weights_false

    def set_init_weights_false(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
        if config_class is MixLoraPeftConfig:
            return fields | {"init_lora_weights": False}
        return ordinary(config_class, fields)

    utils.set_init_weights_false = set_init_weights_false
    small = {"r": 4, "num_experts": 3}
    decoder = importlib.import_module("tests.test_decoder_models")
    decoder.ALL_CONFIGS += [
        pytest.param(MixLoraPeftConfig, small | {"task_type": "CAUSAL_LM"} | fields, id=f"MixLora {name}")
        for name, fields in DECODER_CASES.items()
    ]
    custom = importlib.import_module("tests.test_custom_models")
    custom.TEST_CASES += [
        (f"MixLora {name}", CUSTOM_MODEL, MixLoraPeftConfig, small | fields) for name, fields in CUSTOM_CASES.items()
    ]
    from_pretrained = custom.MockTransformerWrapper.from_pretrained

    def load(model_id: str, dtype: Any = None) -> nn.Module:
        if model_id != CUSTOM_MODEL:
            return from_pretrained(model_id, dtype)
        torch.manual_seed(0)
        return MixLoraDecoder().to(dtype or torch.float32)

    custom.MockTransformerWrapper.from_pretrained = load


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if config.getoption("--minilora") == "cases":
        ours = [item for item in items if "MixLora " in item.name]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _OUTCOMES[report.nodeid] = (report.outcome, _reason(report))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _OUTCOMES[report.nodeid] = (report.outcome, _reason(report))


_OUTCOMES: dict[str, tuple[str, str]] = {}


def _reason(report: Any) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return "" if report.passed else str(crash.message if crash else report.longrepr)[:400]


def pytest_sessionfinish(session: Any) -> None:
    path = session.config.getoption("--outcomes")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            for node_id, (outcome, reason) in sorted(_OUTCOMES.items()):
                file.write(json.dumps([node_id, outcome, reason]) + "\n")
