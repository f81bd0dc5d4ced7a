"""Handler of this repo for Hugging Face Inference Endpoints: text generation with the adapter on its base.

An endpoint made from this repo installs `requirements.txt`, imports this file, and calls ``EndpointHandler(folder)``
once and the handler for every request. The body of a request, and its answer:

    {"inputs": "text to continue", "parameters": {"max_new_tokens": 64}}       [{"generated_text": "..."}]
    {"inputs": ["one text", "another text"]}                                   [[{...}], [{...}]]
    {"inputs": [{"role": "user", "content": "Hello!"}]}                        [{"generated_text": "..."}]

A chat is formatted with the repo's chat template, a text is continued as it is. Requests are answered one after the
other. minilora_hub writes this file into repos that are pushed with `--endpoint`; it does not need minilora_hub.
"""

import json
import math
import os
import threading
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

MOST_INPUTS = 32
MOST_ANSWERS = 64
MOST_STOPS = 16
DEFAULT_NEW_TOKENS = 256

NUMBERS: dict[str, tuple[type, float, float]] = {
    "max_new_tokens": (int, 1, math.inf),
    "num_return_sequences": (int, 1, MOST_ANSWERS),
    "repetition_penalty": (float, 0.01, 10),
    "seed": (int, 0, 2**63 - 1),
    "temperature": (float, 0.01, 100),
    "top_k": (int, 1, 2**31),
    "top_p": (float, 0.0001, 1),
}
"""{parameter: its type, its smallest and its largest value}."""
SWITCHES = ("do_sample", "return_full_text")
PARAMETERS = sorted((*NUMBERS, *SWITCHES, "stop"))


class EndpointHandler:
    """Answer requests with the model of a folder.

    Args:
        path: the folder with this repo's files. Its base is downloaded from the Hub, where needed with the token in
            the environment variable HF_TOKEN.
    """

    def __init__(self, path: str = "") -> None:
        folder = os.fspath(path) or os.path.dirname(os.path.abspath(__file__))
        placement = {"device_map": "auto"} if torch.cuda.is_available() else {}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # A folder without config.json is in PEFT's format, which needs no code. Otherwise the code is this repo's own.
        if os.path.isfile(os.path.join(folder, "config.json")):
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **placement)
        else:
            self.model = _base_with_lora(folder, placement)
        self.model.eval()
        config = getattr(self.model.config, "text_config", self.model.config)
        self.context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31
        self._lock = threading.Lock()  # the seed is torch's global one

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer a request.

        Args:
            data: the body: ``inputs`` and, optionally, ``parameters``: do_sample, max_new_tokens, num_return_sequences,
                repetition_penalty, return_full_text, seed, stop, temperature, top_k, top_p.

        Returns:
            ``[{"generated_text": text}, …]``, an entry for each of `num_return_sequences`; a list of such lists where
            `inputs` is a list of texts or of chats.

        Raises:
            ValueError: something in the request is not valid; the message says what is required.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError(f"the request must be an object with 'inputs', not {_shown(data)}")
        for name, value in data.items():
            if name not in ("inputs", "parameters") and value not in (None, False, {}):
                raise ValueError(f"{name}={_shown(value)}: is not supported; 'inputs' and 'parameters' are")
        several, texts = self._texts(data["inputs"])
        options = _checked(data.get("parameters"))
        chats = not isinstance(texts[0], str)
        if chats and options.get("return_full_text"):
            raise ValueError("parameters.return_full_text: must not be true for chat messages")
        prompts = [self._chat(text) if chats else text for text in texts]
        ids = [self.tokenizer(prompt, add_special_tokens=not chats)["input_ids"] for prompt in prompts]
        answers = self._generate(ids, options)
        before = prompts if options.get("return_full_text") else [""] * len(prompts)
        entries = [
            [{"generated_text": start + text} for text in found] for start, found in zip(before, answers, strict=True)
        ]
        return entries if several else entries[0]

    def _texts(self, inputs: Any) -> tuple[bool, list[Any]]:
        """Return whether there are several inputs, and each of them, a text or a list of messages."""
        if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], dict)):
            several, texts = False, [inputs]
        else:
            several, texts = True, inputs
        if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_INPUTS:
            found = f"{len(texts)} of them" if isinstance(texts, list) else _shown(texts)
            raise ValueError(
                f"inputs: must be a text, chat messages, or a list of 1 to {MOST_INPUTS} such, not {found}"
            )
        if all(isinstance(text, str) and text for text in texts) or all(map(_is_chat, texts)):
            return several, texts
        raise ValueError(
            "inputs: every text must be a non-empty string, every chat a list of messages "
            '{"role": "user", "content": "..."}, and a list must not mix the two'
        )

    def _chat(self, messages: list[dict[str, str]]) -> str:
        """Return the text of a chat."""
        if not self.tokenizer.chat_template:
            raise ValueError("inputs: this model has no chat template: send a text instead of messages")
        try:
            text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it likes, e.g. for a role that it does not know
            raise ValueError(f"inputs: the chat template refuses the messages: {error}") from error
        return text

    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[list[str]]:
        """Return the answers to each prompt."""
        count = options.get("num_return_sequences", 1)
        if len(prompts) * count > MOST_ANSWERS:
            raise ValueError(
                f"{len(prompts)} inputs with {count} answers each: at most {MOST_ANSWERS} answers together"
            )
        longest = max(map(len, prompts))
        room = self.context - longest
        wanted = options.get("max_new_tokens", max(1, min(DEFAULT_NEW_TOKENS, room)))
        if min(map(len, prompts)) == 0 or wanted > room:
            raise ValueError(
                f"a prompt has {longest} tokens and max_new_tokens is {wanted}: a prompt needs at least one token, and "
                f"both together may have at most {self.context}, the model's context"
            )
        # Padded on the left, (prompts, longest).
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        names = ("repetition_penalty", "temperature", "top_k", "top_p")
        arguments = {name: options[name] for name in names if name in options}
        # As in text-generation servers: greedy, unless the request asks for sampling or for something that needs it.
        sampled = {"temperature", "top_k", "top_p", "seed", "num_return_sequences"} & options.keys()
        arguments["do_sample"] = options.get("do_sample", bool(sampled))
        if count > 1 and not arguments["do_sample"]:
            raise ValueError(f"parameters.num_return_sequences={count}: needs do_sample, greedy answers are all equal")
        stops = options.get("stop", [])
        if stops:
            arguments |= {"stop_strings": stops, "tokenizer": self.tokenizer}
        with self._lock, torch.inference_mode():
            if "seed" in options:
                torch.manual_seed(options["seed"])
            rows = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=wanted,
                num_return_sequences=count,
                pad_token_id=self._padding(),
                **arguments,
            )
        texts = [
            _until(text, stops) for text in self.tokenizer.batch_decode(rows[:, longest:], skip_special_tokens=True)
        ]
        return [texts[index * count : (index + 1) * count] for index in range(len(prompts))]

    def _padding(self) -> int:
        """Return the token that fills up answers that ended."""
        found = [self.tokenizer.pad_token_id, self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id, 0]
        token = next(token for token in found if token is not None)
        return token[0] if isinstance(token, list) else token


def _base_with_lora(folder: str, placement: dict[str, Any]) -> Any:
    """Return the base with the LoRA of a folder in PEFT's format.

    Through the folder's name, transformers would fill what the base's checkpoint lacks with random numbers.
    """
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    name, revision = config["base_model_name_or_path"], config.get("revision")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, trust_remote_code=False, output_loading_info=True, **placement
    )
    model, report = loaded
    lacking = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"base {name!r}: its checkpoint lacks {lacking[0]} or has it in another shape ({len(lacking)} such)"
        )
    model.load_adapter(folder)
    if os.path.isfile(os.path.join(folder, "generation_config.json")):
        model.generation_config = GenerationConfig.from_pretrained(folder)  # with the tokens that end an answer
    return model


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def _checked(parameters: Any) -> dict[str, Any]:
    """Return the given parameters; null, and false or an empty list for an unknown one, asks for nothing."""
    if not isinstance(parameters, dict | None):
        raise ValueError(f"parameters={_shown(parameters)}: must be an object")
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    checked = {}
    for name, value in given.items():
        if name in NUMBERS:
            kind, low, high = NUMBERS[name]
            number = isinstance(value, int | kind) and not isinstance(value, bool)
            if not (number and low <= value <= high):
                what = "an integer" if kind is int else "a number"
                raise ValueError(f"parameters.{name}={_shown(value)}: must be {what} from {low} to {high}")
        elif name in SWITCHES:
            if not isinstance(value, bool):
                raise ValueError(f"parameters.{name}={_shown(value)}: must be true or false")
        elif name == "stop":
            value = [value] if isinstance(value, str) else value
            texts = isinstance(value, list) and all(isinstance(stop, str) and stop for stop in value)
            if not texts or len(value) > MOST_STOPS:
                raise ValueError(f"parameters.stop={_shown(value)}: must be at most {MOST_STOPS} non-empty texts")
        elif value not in (False, []):
            raise ValueError(f"parameters.{name}={_shown(value)}: is not supported; these are: {', '.join(PARAMETERS)}")
        else:
            continue
        checked[name] = value
    return checked


def _until(text: str, stops: list[str]) -> str:
    """Return the text before the first stop text."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _shown(value: Any) -> str:
    return repr(value)[:100]
