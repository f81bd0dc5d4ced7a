"""Check that the tokenizer, its chat templates and the generation settings load."""

from __future__ import annotations

import re
from collections.abc import Iterator

from minilora_hub.publish.checks.problems import Folder, Problem

GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag that transformers adds to Jinja's."""
SAVE = "save it again from the base's tokenizer"


def check_tokenizer(folder: Folder) -> Iterator[Problem]:
    """Load tokenizer.json, the chat templates and generation_config.json with the libraries that will read them."""
    text = folder.text("tokenizer.json")
    if text is not None:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            yield Problem("tokenizer", "tokenizer.json", f"does not load: {str(error)[:200]}", SAVE)
    for name in folder.files:
        if name.endswith(".jinja"):
            yield from _check_template(folder, name)
    settings = folder.json_files.get("generation_config.json")
    if isinstance(settings, dict):
        from transformers import GenerationConfig

        try:
            GenerationConfig.from_dict(settings).validate()
        except Exception as error:  # a damaged file may fail anywhere in transformers
            message = f"does not load: {str(error)[:200]}"
            yield Problem("config", "generation_config.json", message, "save the adapter again")


def _check_template(folder: Folder, name: str) -> Iterator[Problem]:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text = folder.text(name)
    if text is None:
        yield Problem("tokenizer", name, "is not UTF-8 text", SAVE)
        return
    text = GENERATION_TAG.sub("", text)
    try:  # parsed, not rendered
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        yield Problem("tokenizer", name, f"is not a Jinja template: {error}", SAVE)
