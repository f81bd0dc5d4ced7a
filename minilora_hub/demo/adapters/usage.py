"""How to use an adapter outside the page: commands and code, as on its card. No Gradio."""

from __future__ import annotations

import json
import shlex

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.tasks import CAUSAL_LM
from minilora_hub.publish.card.serving import serving

LOADED = """from transformers import {auto_class}, AutoTokenizer

repo, revision = {repo}, {revision}
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=False)
model = {auto_class}.from_pretrained(repo, revision=revision, trust_remote_code=True)"""

LOADED_BY_PEFT = """from transformers import AutoModelForCausalLM, AutoTokenizer

repo, revision = {repo}, {revision}  # needs peft
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
model = AutoModelForCausalLM.from_pretrained(repo, adapter_kwargs={{"revision": revision}})"""


def usage(source: AdapterFolder, name: str, repo: str | None, revision: str | None) -> list[dict[str, str]]:
    """Return the ways to use an adapter, ``{"label", "text"}`` each, the simplest first.

    Args:
        source: its configuration.
        name: its name on the page, which stands for its folder where it is in no repo.
        repo: its id on the Hub.
        revision: its commit there.
    """
    stock = source.layout == "peft"
    where = repo or f"./{name.rpartition('/')[2]}"
    template = LOADED_BY_PEFT if stock else LOADED
    code = template.format(
        auto_class=CAUSAL_LM if stock else source.auto_class,
        repo=json.dumps(where),
        revision=json.dumps(revision or "main"),
    )
    commands = serving(source.method, source.config, source.base or "BASE", where, repo, stock)
    ways = [("transformers", code)]
    if commands.vllm:
        ways.append(("vLLM" if source.method == "lora" else "vLLM, with minilora_hub as its plugin", commands.vllm))
    ways.append(("minilora serve, for OpenAI's clients", commands.server))
    if repo:
        pinned = f" --revision {shlex.quote(revision)}" if revision else ""
        out = shlex.quote(f"./{repo.rpartition('/')[2]}")
        ways.append(("download", f"minilora pull {shlex.quote(repo)}{pinned} --out {out}"))
    return [{"label": label, "text": text} for label, text in ways]
