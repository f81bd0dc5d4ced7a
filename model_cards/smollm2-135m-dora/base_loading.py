"""Load a base completely, and compare a loaded one with its checkpoint files.

transformers fills a tensor that a checkpoint lacks with random numbers. And a model in memory may have other weights
than the files whose name it carries: an adapter was merged into it, its embeddings were resized or trained. Both are
errors here.
"""

import json
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from .adapter_files import UNKNOWN, base_fingerprint, base_source, first_names
from .heads import CLASSIFYING, DESCRIBED_LABELS, FRESH, fresh_modules, saved_parameters
from .linear_layers import is_split, whole_tensor

DIGEST_WIDTH = 2**14
ROUNDED_TO = (torch.bfloat16, torch.float16)
WITHOUT_EFFECT = re.compile(
    r"_.*|.*dropout.*|.*drop_?(rate|path.*|prob.*)?|.*layerdrop|output_.*|return_.*|use_cache|.*_token_id|id2label"
    r"|label2id|num_labels|problem_type|dtype|torch_dtype|architectures|auto_map|name_or_path|transformers_version"
    r"|quantization_config|tie_.*|initializer.*|.*init_(range|std|scale)|.*aux_loss.*|.*z_loss.*|gradient_checkpointing"
    r"|task_specific_params|finetuning_task|attn_implementation|experts_implementation|model_type"
)
"""Fields of a base's configuration that say how it is trained, stored or run, or what an adapter has of its own.
Whether embeddings are tied is seen in the weights."""
Digests = dict[str, tuple[torch.dtype, tuple[int, ...], Tensor]]
MayLack = Callable[[Any, list[str]], list[str]]


def load_checked(loader: Any, name_or_path: Any, *, may_lack: MayLack | None = None, **arguments: Any) -> Any:
    """Load a model from its checkpoint, and check that every one of its tensors came from there.

    Args:
        loader: a class with `from_pretrained`: an Auto class or a model's own.
        name_or_path: Hub id or folder.
        may_lack: returns, of the model and the names of tensors that the checkpoint lacks or has in another shape,
            those that it must have. Default: all.
        **arguments: of `from_pretrained`.

    Raises:
        ValueError: the checkpoint is damaged, lacks a tensor or has another shape for it; the message names it. A
            missing tensor that is tied to another is no error, nor are those beyond the model's (a head, a tower).
    """
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are named below
    try:
        model, report = loader.from_pretrained(name_or_path, **arguments)
    except SafetensorError as error:
        raise ValueError(f"the checkpoint {str(name_or_path)!r} is damaged ({error}): get it again") from error
    shapes = {name: (tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]}
    needed = sorted({*report["missing_keys"], *shapes})
    if may_lack is not None and needed:
        needed = may_lack(model, needed)
    missing = [name for name in needed if name not in shapes]
    misshapen = [(name, *shapes[name]) for name in needed if name in shapes]
    problems = [f"{name} has the shape {found} there instead of {wanted}" for name, found, wanted in misshapen]
    if missing:
        problems.insert(0, f"missing {first_names(missing)}{_other_names(missing, report['unexpected_keys'])}")
    if problems:
        raise ValueError(
            f"the checkpoint {str(name_or_path)!r} does not have all weights of a {type(model).__name__}, and "
            f"transformers would fill in random numbers: {'; '.join(problems)}"
        )
    return model


def load_base(auto_class: Any, config: Any, trust_remote_code: bool, arguments: dict[str, Any], seed: int = 0) -> Any:
    """Load the base that an adapter's configuration names, with `load_checked`.

    Args:
        auto_class: one of `heads.HEADS`.
        config: the adapter's configuration. If it is new, modules that the checkpoint lacks are added to it.
        trust_remote_code: whether the base's own code may run.
        arguments: of `from_pretrained`.
        seed: seed of what the checkpoint lacks.

    Raises:
        ValueError, OSError: no base is named, or it could not be loaded.
    """
    name = config.base_model_name_or_path
    if name is None:
        raise ValueError("base_model_name_or_path=None: the configuration names no base; pass base_model=")
    # AutoModel looks for a PEFT adapter first, and would use the network without these.
    offline = {key: arguments[key] for key in ("local_files_only", "cache_dir") if key in arguments}
    arguments = {"adapter_kwargs": offline, **arguments} if offline else arguments
    arguments |= {"revision": config.base_model_revision}
    source = base_source(name)
    fresh = bool(config.modules_to_save) or auto_class.__name__ in FRESH
    arguments |= {"may_lack": partial(_must_have, auto_class, config)} if fresh else {}
    quiet = _without_report() if fresh else nullcontext()  # transformers would advise to train what is fresh
    try:
        with quiet, torch.random.fork_rng(devices=[], enabled=fresh):
            if fresh:
                torch.manual_seed(seed)
            return load_checked(auto_class, source, trust_remote_code=trust_remote_code, **arguments)
    except (OSError, ValueError) as error:
        kind, hint = (OSError if isinstance(error, OSError) else ValueError), ""
        if "trust_remote_code" in str(error):
            hint = "the base runs code of its own: pass base_trust_remote_code=True if you trust it"
        elif kind is OSError or str(error).startswith("the checkpoint"):  # else an argument is wrong
            hint = "pass base_model=<a folder or another Hub id>"
        advice = f"\nWhat to do: {hint}" if hint else ""
        raise kind(f"the base model {name!r} could not be loaded: {error}{advice}") from error


def load_base_for_adapter(
    auto_class: Any, config: Any, trust_remote_code: bool, dtype: Any, shared: dict[str, Any], others: dict[str, Any]
) -> Any:
    """Load the base of a saved adapter, and warn if it is another than the adapter was trained on.

    Args: see `load_base`; `others` go to the base only, `shared` also found the adapter.
    """
    # AutoConfig has taken attn_implementation out of the arguments: without this the base would keep its default.
    if config._attn_implementation is not None:
        others.setdefault("attn_implementation", config._attn_implementation)
    # The same holds for everything that was set on the configuration for the base (as use_cache=False).
    arguments = {"dtype": dtype or config.dtype or "auto", **config.base_changes(), **shared, **others}
    if auto_class.__name__ in CLASSIFYING:
        labels = config.text_config.to_diff_dict()
        arguments = {n: getattr(config.text_config, n) for n in DESCRIBED_LABELS if n in labels} | arguments
    base = load_base(auto_class, config, trust_remote_code, arguments)
    trained_on = config.base_fingerprint
    found = UNKNOWN if trained_on == UNKNOWN else fingerprint_of(config, shared.get("cache_dir"))
    name, other, differing = config.base_model_name_or_path, "", []
    if found not in (UNKNOWN, trained_on):
        other = f"with fingerprint {trained_on}, but {name!r} has {found}"
    elif found != UNKNOWN and type(config.text_config) is type(base.config):  # the same weights, but is that all?
        clauses = differing_settings(base.config, config.text_config)
        differing = [clause for clause in clauses if clause.partition(" ")[0] not in others]  # which were asked for
    if differing:
        other = f"of another configuration than {name!r} has, whose {first_names(differing)}"
    if other:
        warnings.warn(
            f"this adapter was trained on a base {other}: its outputs may differ from those its author saw",
            stacklevel=4,
        )
    return base


def fingerprint_of(config: Any, cache_dir: Any) -> str:
    """Return the fingerprint of the base that an adapter's configuration names."""
    name = config.base_model_name_or_path
    return UNKNOWN if name is None else base_fingerprint(base_source(name), config.base_model_revision, cache_dir)


def _must_have(auto_class: Any, config: Any, model: Any, lacking: list[str]) -> list[str]:
    """Return those of the tensors that a checkpoint lacks that are not saved with the adapter."""
    if config.modules_to_save is None and config.text_config is None and auto_class.__name__ in FRESH:
        modules, others = fresh_modules(model, lacking, auto_class.__name__)
        config.modules_to_save = modules or None
        return others
    saved = saved_parameters(model, config.modules_to_save)
    return [name for name in lacking if name not in saved]


def _other_names(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Say under which other name a missing tensor seems to be there, e.g. that of a compiled model; "" if none."""
    for name in missing:
        for other in sorted(unexpected):
            parts = iter(other.split("."))
            if all(part in parts for part in name.split(".")):
                return f" (it has {other} instead, as saved from a compiled or wrapped model: save the plain one)"
    return ""


def refuse_unknown_tokens(ids: Iterable[int], rows: int, tokenizer: Any) -> None:
    """Raise a ValueError that names the first of these token ids that an embedding of `rows` rows does not have."""
    for token in ids:
        if token >= rows:
            raise ValueError(
                f"token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but the base's embedding has "
                f"{rows} rows: use the base's own tokenizer, or a base whose embeddings were resized for this one"
            )


def settle_quantization(base: Any, config: Any) -> None:
    """Record in an adapter's configuration how the base's checkpoint is quantized; refuse a base of another quantizer.

    An adapter may make up for the rounding of its base, so it would be wrong on any other. Settings that only one
    version of transformers knows are not compared.
    """
    quantizer = getattr(base, "hf_quantizer", None)
    settings = quantizer.quantization_config.to_dict() if quantizer is not None and quantizer.pre_quantized else {}
    found, recorded = json.loads(json.dumps(settings, default=str)), config.base_quantization or {}
    if recorded and not (found and all(found.get(name, value) == value for name, value in recorded.items())):
        raise ValueError(f"the adapter was trained on a base quantized with {recorded}; this one has {found or 'none'}")
    config.base_quantization = found or None


def differing_tensors(
    base: Any, folder: str | None, given: Mapping[int, Tensor] | None = None, saved: Container[str] = ()
) -> list[str]:
    """Compare a plain base with the checkpoint in a folder.

    The checkpoint is loaded as transformers loads it: on the CPU and in its own dtype its files are mapped, not copied;
    a base that was quantised while loading is quantised again. Values are compared after the cast to the base's dtype;
    those that were rounded to half precision on the way are equal. Offloaded tensors are not compared, and split ones
    only without `given`: every process must call this then.

    Args:
        base: a model without an adapter.
        folder: the folder of its checkpoint.
        given: {id of a parameter: the value to compare instead of it}.
        saved: names of the parameters that are saved with the adapter, and not compared.

    Returns: the differences, a clause for each tensor, which begins with its name.
    """
    quantizer = getattr(base, "hf_quantizer", None)
    arguments: dict[str, Any] = {"dtype": "auto"}
    if quantizer is not None:
        arguments = {"dtype": base.config.dtype, "device_map": getattr(base, "hf_device_map", {"": base.device})}
        if not quantizer.pre_quantized:
            arguments["quantization_config"] = base.config.quantization_config
    arguments |= {name: getattr(base.config, name) for name in DESCRIBED_LABELS[:2] if hasattr(base.config, name)}
    with _without_report(bars=False), torch.random.fork_rng(devices=[]):  # missing tensors are drawn at random
        in_files, report = type(base).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    absent = report["missing_keys"] | {name for name, _, _ in report["mismatched_keys"]}
    theirs = in_files.state_dict()
    found = []
    for name, tensor in base.state_dict(keep_vars=True).items():
        tensor = whole_tensor(tensor) if given is None else given.get(id(tensor), tensor)
        value = theirs.pop(name, None)
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or is_split(tensor) or name in saved:
            continue
        if value is None or name in absent:
            found.append(f"{name} is not in the files")
        elif tensor.shape != value.shape:
            found.append(f"{name} has the shape {tuple(tensor.shape)} instead of {tuple(value.shape)}")
        elif not _is_same(tensor.detach(), value):
            found.append(f"{name} has other values")
    return found + [f"{name} is in the files only" for name in theirs]


def differing_settings(config: Any, other: Any) -> list[str]:
    """Compare two configurations of a base, as far as outputs depend on them.

    Args:
        config: the base's.
        other: another one of its class, or the folder that holds it.

    Returns: the differences, a clause for each field, which begins with its name.
    """
    if isinstance(other, str):
        with _without_report():
            other = type(config).from_pretrained(other)
    fields, others = (json.loads(json.dumps(each.to_dict(), default=str)) for each in (config, other))
    return _differing_fields(fields, others, "")


def _differing_fields(fields: dict[str, Any], others: dict[str, Any], parent: str) -> list[str]:
    found: list[str] = []
    for name in sorted(fields.keys() & others.keys()):  # a field that the class does not know has no effect
        value, there = fields[name], others[name]
        if value == there or WITHOUT_EFFECT.fullmatch(name):
            continue
        if isinstance(value, dict) and isinstance(there, dict) and name.endswith("_config"):
            found += _differing_fields(value, there, f"{parent}{name}.")
        else:
            found.append(f"{parent}{name} is {value!r} instead of {there!r}")
    return found


def _values(tensor: Tensor) -> Tensor:
    """The values of a tensor; of one that a quantizer has made a class of its own (torchao's), as floats."""
    return tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") and not is_split(tensor) else tensor


def _is_same(tensor: Tensor, value: Tensor) -> bool:
    tensor, value = _values(tensor), _values(value).to(tensor.device)
    if torch.equal(tensor, value.to(tensor.dtype)):
        return True
    return tensor.is_floating_point() and any(torch.equal(tensor, value.to(d).to(tensor.dtype)) for d in ROUNDED_TO)


@torch.no_grad()
def tensor_digests(base: Any, given: Mapping[int, Tensor] | None = None, saved: Container[str] = ()) -> Digests:
    """Compute a digest of each parameter, {name: digest}, that changes with its values.

    A digest holds, for every `DIGEST_WIDTH` values, their scalar product with a fixed vector. (A hash would cost ten
    times as much, and a copy from the GPU.)
    """
    found = {}
    for name, parameter in base.named_parameters():
        tensor = _values((given or {}).get(id(parameter), parameter).detach())
        if name in saved or tensor.is_meta or is_split(tensor):
            continue
        direction = torch.sin(torch.arange(1, DIGEST_WIDTH + 1, device=tensor.device, dtype=torch.float32))
        products = []
        for piece in tensor.reshape(-1).split(1024 * DIGEST_WIDTH):  # bounds the memory of the cast
            tail = piece.numel() % DIGEST_WIDTH
            rows, rest = piece.float().split([piece.numel() - tail, tail])
            products += [rows.view(-1, DIGEST_WIDTH) @ direction, (rest @ direction[:tail]).view(1)]
        found[name] = (tensor.dtype, tuple(tensor.shape), torch.cat(products).cpu())
    return found


def same_digests(first: Digests, second: Digests) -> bool:
    """Whether two results of `tensor_digests` are equal."""
    return first.keys() == second.keys() and all(
        first[name][:2] == second[name][:2] and torch.equal(first[name][2], second[name][2]) for name in first
    )


@contextmanager
def _without_report(bars: bool = True) -> Iterator[None]:
    """Suppress the loading report of transformers, and its progress `bars` where they are not wanted."""
    hide, verbosity = logging.is_progress_bar_enabled() and not bars, logging.get_verbosity()
    if hide:
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            logging.enable_progress_bar()
