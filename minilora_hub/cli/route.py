"""`minilora route`: choose an adapter by the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minilora_hub.cli.options import AsJson, Debug, print_json, print_table, say
from minilora_hub.formatting import require_encodable

Index = Annotated[Path, typer.Argument(metavar="INDEX", help="A file that `minilora route build` has written.")]

route = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Choose an adapter by the prompt.")


@route.command(
    "build",
    epilog="Example: minilora route build ./dates ./digits --prompts dates.jsonl --prompts digits.jsonl --out my.index",
)
def build(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER…", help="Adapters on one base: folders or ids.")],
    out: Annotated[Path, typer.Option(metavar="INDEX", help="The file to write.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts for each adapter, in order: training rows, or a .txt file with one on each line. Default: "
            "the rows that it was trained on, for adapters in the folder of their training.",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="The most prompts to read of each adapter.")] = 32,
    base: Annotated[str | None, typer.Option(help="The base. Default: the one that the adapters name.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Embed prompts that each adapter is for, with the base itself, and write them as an index."""
    from minilora_hub.compare.found_adapters import common_base, find_adapters
    from minilora_hub.training.prompts import read_prompts, trained_on

    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: must be a file in a folder that exists")
    found = find_adapters(adapters)
    if prompts and len(prompts) != len(found):
        raise ValueError(f"--prompts: {len(prompts)} files for {len(found)} adapters: give one for each, in order")
    asked: list[dict[str, Any]] = [{"sources": (file,)} for file in prompts or ()] or [
        trained_on(adapter.folder) for adapter in found
    ]
    texts = {
        adapter.name: (_as_given(name), read_prompts(count=count, **source))
        for adapter, name, source in zip(found, adapters, asked, strict=True)
    }

    from minilora_hub.bases.loading import load_base, load_tokenizer
    from minilora_hub.compare.prompt_index import AdapterIndex

    resolved, fingerprint = common_base(base, found)
    model = load_base(resolved, dtype="float32", progress=say).eval()
    index = AdapterIndex.build(model, load_tokenizer(resolved), _as_given(resolved.name), fingerprint, texts)
    index.save(out)
    if as_json:
        print_json({"index": str(out), "prompts": {adapter.name: adapter.prompts for adapter in index.adapters}})
        return
    for adapter in index.adapters:
        say(f"  {adapter.name}: {adapter.prompts} prompts")
    typer.echo(str(out))


@route.command("ask", epilog='Example: minilora route ask my.index --prompt "Write as YYYY-MM-DD: 3 May 1999"')
def ask(
    index: Index,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt. May be repeated.")],
    base: Annotated[str | None, typer.Option(help="The base. Default: the one that the index names.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say which adapter suits a prompt, how similar its prompts are, and which one is second."""
    from minilora_hub.bases.loading import load_base, load_tokenizer
    from minilora_hub.bases.resolving import resolve_base
    from minilora_hub.compare.prompt_index import AdapterIndex, embedding
    from minilora_hub.remote_code.adapter_files import base_fingerprint

    require_encodable(prompt, "--prompt")
    found = AdapterIndex.load(index)
    resolved = resolve_base(base or found.base)
    found.require_base(base_fingerprint(str(resolved.path)))
    model, tokenizer = load_base(resolved, dtype="float32", progress=say).eval(), load_tokenizer(resolved)
    choices = [found.choose(embedding(model, tokenizer, text)) for text in prompt]
    if as_json:
        print_json([{"prompt": text, **choice.to_dict()} for text, choice in zip(prompt, choices, strict=True)])
        return
    print_table([[choice.described(), text] for text, choice in zip(prompt, choices, strict=True)])


def _as_given(name: str) -> str:
    """A folder by its full path, so that the index works from elsewhere; an id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
