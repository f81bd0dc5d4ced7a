"""The table of architectures in docs/load.md: what works on each, found by trying it on a tiny random base.

    .venv/bin/python tests/architecture_table.py           # compute every row, and write them into the page
    .venv/bin/python tests/architecture_table.py bert t5   # only these

A slow test computes every row anew and compares it with the page.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import fill_adapter, tiny_config, token_ids
from tiny_architectures import ARCHITECTURES, tiny_architecture, tiny_encoder_decoder, tiny_vision_language
from tiny_heads import CASES, MORE, inputs_of, labels_of, tiny_head, values_of

from minilora_hub.remote_code.base_structure import ExpertsSite
from minilora_hub.remote_code.modeling_minilora import adapted_class
from minilora_hub.training.lora_model import LoraConfig as OurLoraConfig
from minilora_hub.training.lora_model import LoraForCausalLM as OurLora

PAGE = Path(__file__).parents[1] / "docs" / "load.md"
BEGIN, END = "<!-- architectures: begin -->\n", "<!-- architectures: end -->\n"
HEADER = "| architecture | base | DoRA | equal to PEFT's DoRA | MixLoRA |\n| --- | --- | --- | --- | --- |\n"
ROWS: dict[str, tuple[str, str]] = {
    **{f"{name} CausalLM": (name, "AutoModelForCausalLM") for name in ARCHITECTURES},
    **{f"{name} {auto.removeprefix('AutoModel')}": (name, auto) for name, auto in (*CASES, *MORE)},
    **{
        f"{name} ForImageTextToText": (name, "AutoModelForImageTextToText")
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3")
    },
    **{f"{name} ForSeq2SeqLM": (name, "AutoModelForSeq2SeqLM") for name in ("mt5", "marian")},
}
REFUSALS = {
    "experts of this base are stacked parameters": "refused: stacked experts",
    "no feed-forward block of a known form": "refused: no block of a known form",
    "feed-forward blocks": "refused: several blocks in a layer",
    "goes into one list of layers": "refused: two lists of layers",
    "would have no effect": "refused: the block is not called",
}
"""What is in an error -> what the table says."""


def row(key: str) -> str:
    """Compute a row of the table."""
    name, auto_name = ROWS[key]
    dora, peft = _dora(name, auto_name)
    return f"| {name} | `{auto_name}` | {dora} | {peft} | {_mixlora(name, auto_name)} |\n"


def base_of(name: str, auto_name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny random base in eval mode, and inputs for it."""
    if auto_name == "AutoModelForImageTextToText":
        return tiny_vision_language(name), {"input_ids": token_ids()}
    if auto_name == "AutoModelForCausalLM":
        return tiny_architecture(name), {"input_ids": token_ids()}
    if name in ("mt5", "marian"):
        return tiny_encoder_decoder(name), {"input_ids": token_ids(), "decoder_input_ids": token_ids().flip(1)}
    return tiny_head(name, auto_name), inputs_of(name, auto_name)


def _dora(name: str, auto_name: str) -> tuple[str, str]:
    said, parameters = "yes", None
    base, _ = base_of(name, auto_name)
    try:
        _adapted(base, auto_name, "dora")
    except ValueError as error:
        said, parameters = _refusal(error), []
        if "stacked" not in said:
            return said, "not run"
        said = "beside the stacked experts"
    base, inputs = base_of(name, auto_name)
    model = _check(base, inputs, name, auto_name, "dora", parameters)
    if any(isinstance(site, ExpertsSite) for site in model.sites):
        said = "yes, stacked experts too"
        peft = _lora_in_peft(name, auto_name)
    else:
        peft = _in_peft(model, base_of(name, auto_name)[0], inputs)
    with torch.no_grad():
        trained = values_of(model(**inputs))
        _require(_gap(values_of(model.merge()(**inputs)), trained) <= 1e-4, "merge")
    return said, peft


def _mixlora(name: str, auto_name: str) -> str:
    base, inputs = base_of(name, auto_name)
    try:
        _adapted(copy.deepcopy(base), auto_name, "mixlora")
    except ValueError as error:
        return _refusal(error)
    _check(base, inputs, name, auto_name, "mixlora")
    return "yes"


def _adapted(base: Any, auto_name: str, method: str, parameters: Any = None) -> Any:
    towers = "all" if hasattr(base, "get_text_features") else None
    model_class = adapted_class("Dora" if method == "dora" else "MixLora", auto_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what has no effect is left out with a warning; `_check` sees the rest
        return model_class.from_base(base, tiny_config(method, towers=towers, target_parameters=parameters)).eval()


def _check(base: Any, inputs: dict[str, Any], name: str, auto_name: str, method: str, parameters: Any = None) -> Any:
    """Adapt, train, save and load; return the trained model."""
    plain = copy.deepcopy(base)
    model = _adapted(base, auto_name, method, parameters)
    with torch.no_grad():
        before = values_of(plain(**inputs))
        _require(_gap(values_of(model(**inputs)), before) <= 1e-5 * max(1, float(before.abs().max())), "fresh output")
    fill_adapter(model)
    outputs = model.train()(**inputs, **(labels_of(auto_name, inputs) if name in ("clip", "siglip") else {}))
    values = [value for value in outputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    sum(value.float().square().sum() for value in values).backward()
    parameters = model.adapter_parameters()
    dead = [key for key, parameter in parameters.items() if parameter.grad is None and "pooler" not in key]
    _require(not dead, f"every adapter learns: {dead}")
    model.eval()
    with torch.no_grad():
        trained = values_of(model(**inputs))
        _require(_gap(trained, before) > 1e-6, "the adapter has an effect")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, base_model=plain)
            _require(torch.equal(values_of(loaded(**inputs)), trained), "save and load")
    return model


def _in_peft(model: Any, base: Any, inputs: dict[str, Any]) -> str:
    """Whether PEFT's DoRA with the same tensors computes the same."""
    paths = {site.name: site.path for site in model.sites}
    saved = list(model.config.modules_to_save or ())
    settings = LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=list(paths.values()), modules_to_save=list(saved) or None
    )  # PEFT adds to its list
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = get_peft_model(base, settings).eval()
    except (ValueError, NotImplementedError):
        return "PEFT refuses"
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, value in model.adapter_parameters().items():
            site, _, leaf = key.rpartition(".")
            if site in paths:
                leaf = {"magnitude": "lora_magnitude_vector.default.weight"}.get(leaf, f"{leaf}.default.weight")
                parameters[f"base_model.model.{paths[site]}.{leaf}"].copy_(value)
            else:
                module = next(each for each in saved if key.startswith(f"{each}."))
                leaf = key.removeprefix(f"{module}.")
                parameters[f"base_model.model.{module}.modules_to_save.default.{leaf}"].copy_(value)
        mine, other = values_of(model(**inputs)), values_of(theirs(**inputs))
    return "yes" if _gap(mine, other) <= 1e-4 * max(1.0, float(mine.abs().max())) else "no"


def _lora_in_peft(name: str, auto_name: str) -> str:
    """Whether PEFT's LoRA with the same tensors computes the same: it has no DoRA on parameters."""
    base, inputs = base_of(name, auto_name)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        model = OurLora.from_base(base, OurLoraConfig(r=4)).eval()
        fill_adapter(model)
        model.save_pretrained(folder)
        try:
            theirs = PeftModel.from_pretrained(base_of(name, auto_name)[0], folder).eval()
        except (ValueError, NotImplementedError):
            return "PEFT refuses"
    with torch.no_grad():
        mine, other = values_of(model(**inputs)), values_of(theirs(**inputs))
    return "LoRA: yes" if _gap(mine, other) <= 1e-4 * max(1.0, float(mine.abs().max())) else "LoRA: no"


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise AssertionError(what)


def _refusal(error: ValueError) -> str:
    found = [said for words, said in REFUSALS.items() if words in str(error)]
    if not found:
        raise error
    return found[0]


def rows_of_page() -> dict[str, str]:
    """Return the rows of the page, by their first two cells."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line + "\n" for line in text.splitlines()[2:] if line.startswith("| ")]
    return {tuple(line.split(" | ")[:2]): line for line in lines}  # type: ignore[misc]


def main(names: list[str]) -> None:
    """Write the table, or only the rows of some architectures."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    kept = rows_of_page() if names else {}
    made = []
    for key, (name, auto_name) in sorted(ROWS.items()):
        line = row(key) if not names or name in names else kept.get((f"| {name}", f"`{auto_name}`"), "")
        print(line, end="", flush=True)
        made.append(line)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + HEADER + "".join(made) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
