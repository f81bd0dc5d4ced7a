"""Load adapters where minilora_hub cannot be imported. A script that runs in a separate process.

It reads one JSON job per line from stdin and answers each with one JSON line on stdout. Output of libraries goes to
stderr. It only loads, computes and reports; the parent process evaluates the answer. A job:

    target, revision     folder or Hub id of the adapter, and its commit
    layout               "auto" (the repo's own code, through an Auto class) or "peft"
    auto_class           name of the Auto class
    base                 folder of another base than the adapter names; null for the named one
    dtype                "float32", …
    prompts, tokens      as in verification.json: inputs, and the tokens whose logits are wanted
    copy                 a copy of the weights to damage, with the configuration beside it, or null
    damages              {name: [position, bytes in hexadecimal]}: written into the copy in turns; loading must fail
    peft                 folder of the same adapter in PEFT's format, or null
    tokenizer, processor whether the adapter has one, which is loaded too
"""

import json
import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.utils import logging

sys.modules["minilora_hub"] = None  # type: ignore[assignment]  # so that importing it fails


OUTPUTS = runpy.run_path(str(Path(__file__).parents[2] / "recording" / "model_outputs.py"))


def main() -> None:
    """Answer every job on stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception as error:  # the repo's code may raise anything; it is reported
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@torch.no_grad()
def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load the adapter, compute logits, and try to load damaged copies."""
    dtype = getattr(torch, job["dtype"])
    if job["tokenizer"]:
        AutoTokenizer.from_pretrained(job["target"], revision=job["revision"], trust_remote_code=False)
    problem = processor_problem(job) if job["processor"] else None
    if job["layout"] == "peft":
        stock = load_peft_layout(job, dtype)
        return {"class": class_name(stock), "logits": logits(stock, job)}
    # `base_model=None` would be taken for a name.
    given = {"base_model": job["base"]} if job["base"] else {}
    model: Any = getattr(transformers, job["auto_class"]).from_pretrained(
        job["target"], revision=job["revision"], dtype=dtype, trust_remote_code=True, **given
    )
    answer: dict[str, Any] = {"class": class_name(model), "logits": logits(model, job), "refusals": {}}
    answer |= {"processor": problem} if job["processor"] else {}
    base = model.unload()
    for name, (offset, content) in job["damages"].items():
        with damaged(job["copy"], offset, bytes.fromhex(content)) as folder:
            answer["refusals"][name] = refusal(type(model), folder, base)
    if job["peft"]:
        answer["peft"] = logits(with_peft(base, job["peft"]), job)
    return answer


def load_peft_layout(job: dict[str, Any], dtype: torch.dtype) -> Any:
    """Load PEFT's own layout: through AutoModel, unless another base is given."""
    if not job["base"]:
        return AutoModelForCausalLM.from_pretrained(
            job["target"], revision=job["revision"], dtype=dtype, trust_remote_code=False
        )
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype, trust_remote_code=False)
    return with_peft(base, job["target"])


def with_peft(base: Any, folder: str) -> Any:
    """Load an adapter in PEFT's format onto a base. Missing tensors, for which PEFT only warns, are an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(base, folder).eval()


@contextmanager
def damaged(weights: str, offset: int, content: bytes) -> Iterator[str]:
    """Yield the folder of the copy with some bytes of the weights changed, and restore them afterwards."""
    with open(weights, "r+b", buffering=0) as file:
        file.seek(offset)
        before = file.read(len(content))
        file.seek(offset)
        file.write(content)
        try:
            yield os.path.dirname(weights)
        finally:
            file.seek(offset)
            file.write(before)


def refusal(model_class: Any, folder: str, base: Any) -> str | None:
    """Return the error message of loading a damaged copy, or None if it loads."""
    try:
        model_class.from_pretrained(folder, base_model=base).unload()
    except ValueError as error:
        return str(error).replace(f"{folder}/", "")
    return None


def class_name(thing: Any) -> str:
    """Return the full name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def logits(model: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, per prompt, the recorded values of the wanted places, and the largest of all others."""
    rows = zip(*OUTPUTS["logits_of"](model, job["prompts"], job["tokens"]), strict=True)
    return [{"wanted": wanted, "highest_other": highest} for wanted, highest in rows]


def processor_problem(job: dict[str, Any]) -> str | None:
    """Return why the adapter's processor cannot be loaded; None if it can."""
    try:
        AutoProcessor.from_pretrained(job["target"], revision=job["revision"], trust_remote_code=False)
    except ImportError as error:  # a package that this machine lacks
        return f"not loaded: {error}"
    return None


if __name__ == "__main__":
    main()
