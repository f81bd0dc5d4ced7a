"""Loading a base whole, and telling whether a loaded one is what its checkpoint files hold.

transformers fills a tensor that a checkpoint lacks with random numbers and goes on. And a model in memory may have
other weights than the files whose name it carries: an adapter was merged into it, its embeddings were resized or
trained. Here both are errors, so that loading an adapter gives the base it was made for.
"""

from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from .adapter_files import first_names

DIGEST_WIDTH = 2**14
ROUNDED_TO = (torch.bfloat16, torch.float16)


def load_checked(loader, name_or_path, **arguments):
    """Load a model from its checkpoint, and check that every one of its tensors came from there.

    Args:
        loader: a class with `from_pretrained`: an Auto class or a model's own.
        name_or_path: Hub id or folder.
        **arguments: passed to `from_pretrained`.

    Raises:
        ValueError: the checkpoint is damaged, lacks a tensor or has another shape for it; the message names it. A
            missing tensor that is tied to another is no error, nor are those beyond the model's (a head, a tower).
    """
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are named below
    try:
        model, report = loader.from_pretrained(name_or_path, **arguments)
    except SafetensorError as error:
        raise ValueError(f"the checkpoint {str(name_or_path)!r} is damaged ({error}): get it again") from error
    missing = sorted(report["missing_keys"])
    problems = [
        f"{name} has the shape {tuple(found)} there instead of {tuple(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    if missing:
        problems.insert(0, f"missing {first_names(missing)}{_other_names(missing, report['unexpected_keys'])}")
    if problems:
        raise ValueError(
            f"the checkpoint {str(name_or_path)!r} does not have all weights of a {type(model).__name__}, and "
            f"transformers would fill in random numbers: {'; '.join(problems)}"
        )
    return model


def _other_names(missing, unexpected):
    """Under which name a missing tensor seems to be there, e.g. that of a compiled or wrapped model."""
    for name in missing:
        for other in sorted(unexpected):
            parts = iter(other.split("."))
            if all(part in parts for part in name.split(".")):
                return f" (it has {other} instead, as saved from a compiled or wrapped model: save the plain one)"
    return ""


def refuse_unknown_tokens(ids, rows, tokenizer):
    """Raise a ValueError that names the first of these token ids for which an embedding of `rows` rows has none."""
    for token in ids:
        if token >= rows:
            raise ValueError(
                f"token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but the base's embedding has "
                f"{rows} rows: use the base's own tokenizer, or a base whose embeddings were resized for this one"
            )


def differing_tensors(base, folder, given=None):
    """Compare a plain base with the checkpoint in a folder.

    The checkpoint is loaded as transformers loads it. On the processor and in its own dtype its files are mapped, not
    copied; a base that is quantised when it is loaded is loaded so once more. Values are compared after the cast to
    the dtype that the base has them in; those that were rounded to half precision on the way count as the same.
    Offloaded and sharded tensors are not compared.

    Args:
        base: a model without an adapter.
        folder: where its checkpoint lies.
        given: {id of a parameter: the value to compare instead of it}.

    Returns:
        What differs, a clause for each tensor.
    """
    quantizer = getattr(base, "hf_quantizer", None)
    arguments = {"dtype": "auto"}
    if quantizer is not None:
        arguments = {"dtype": base.config.dtype, "device_map": getattr(base, "hf_device_map", {"": base.device})}
        if not quantizer.pre_quantized:
            arguments["quantization_config"] = base.config.quantization_config
    with _quiet(), torch.random.fork_rng(devices=[]):  # missing tensors are drawn at random
        in_files, report = type(base).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    absent = report["missing_keys"] | {name for name, _, _ in report["mismatched_keys"]}
    theirs = in_files.state_dict()
    found = []
    for name, tensor in base.state_dict(keep_vars=True).items():
        tensor = (given or {}).get(id(tensor), tensor)
        value = theirs.pop(name, None)
        if not isinstance(tensor, torch.Tensor) or not _is_whole(tensor):
            continue
        if value is None or name in absent:
            found.append(f"{name} is not in the files")
        elif tensor.shape != value.shape:
            found.append(f"{name} has the shape {tuple(tensor.shape)} instead of {tuple(value.shape)}")
        elif not _is_same(tensor.detach(), value):
            found.append(f"{name} has other values")
    return found + [f"{name} is in the files only" for name in theirs]


def _is_same(tensor, value):
    value = value.to(tensor.device)
    if torch.equal(tensor, value.to(tensor.dtype)):
        return True
    return tensor.is_floating_point() and any(torch.equal(tensor, value.to(d).to(tensor.dtype)) for d in ROUNDED_TO)


def _is_whole(tensor):
    """Whether a tensor's values lie in this process: not offloaded, and no shard of a larger one."""
    return not (tensor.is_meta or hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id"))


@torch.no_grad()
def tensor_digests(base, given=None):
    """{name: digest} of a model's parameters, in which a change of their values shows; one pass over them.

    A digest holds, for every `DIGEST_WIDTH` values, their scalar product with a fixed vector. (A hash would cost ten
    times as much, and a copy from the GPU.)
    """
    found = {}
    for name, parameter in base.named_parameters():
        tensor = (given or {}).get(id(parameter), parameter).detach()
        if not _is_whole(tensor):
            continue
        direction = torch.sin(torch.arange(1, DIGEST_WIDTH + 1, device=tensor.device, dtype=torch.float32))
        products = []
        for piece in tensor.reshape(-1).split(1024 * DIGEST_WIDTH):  # bounds the memory of the cast
            tail = piece.numel() % DIGEST_WIDTH
            rows, rest = piece.float().split([piece.numel() - tail, tail])
            products += [rows.view(-1, DIGEST_WIDTH) @ direction, (rest @ direction[:tail]).view(1)]
        found[name] = (tensor.dtype, tuple(tensor.shape), torch.cat(products).cpu())
    return found


def same_digests(first, second):
    """Whether two results of `tensor_digests` are equal."""
    return first.keys() == second.keys() and all(
        first[name][:2] == second[name][:2] and torch.equal(first[name][2], second[name][2]) for name in first
    )


@contextmanager
def _quiet():
    """No progress bars and no loading report of transformers."""
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
