"""The bodies of requests, as OpenAI's API defines them; what the server cannot do is refused by name."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from minilora_hub.compare.engine import Sampling
from minilora_hub.compare.sampling import PENALTIES
from minilora_hub.errors import ServingError
from minilora_hub.formatting import require_encodable

MOST_ALTERNATIVES = 20
MOST_STOPS = 16
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
"""Fields without an effect on the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
}
"""Fields that the server does not support, with the values that ask for nothing."""


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class _Body(BaseModel):
    """The body of a request."""

    @model_validator(mode="before")
    @classmethod
    def _require_text(cls, content: Any) -> Any:
        r"""Refuse ``"\ud800"`` and the like, which JSON can write, and neither tokenizers nor an answer can."""
        require_encodable(content, "text")
        return content


class _Request(_Body):
    """Fields that chats and completions share."""

    model_config = ConfigDict(extra="allow")
    model: Annotated[str, Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**63)] | None = None
    repetition_penalty: Annotated[float, Field(ge=PENALTIES[0], le=PENALTIES[1])] | None = None
    return_routed_experts: bool | None = None

    @property
    def count(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def refuse_unsupported(self) -> None:
        """Refuse fields that would change the answer if the server knew them.

        Raises:
            ServingError: there is one (400).
        """
        if self.stream_options is not None and not self.stream:
            raise ServingError(400, "stream_options: must not be given without stream=true", "stream_options")
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or (name in NEUTRAL and value in NEUTRAL[name]):
                continue
            need = f"; only {NEUTRAL[name][-1]!r} is" if name in NEUTRAL else ""
            raise ServingError(400, f"{name}: is not supported by this server{need}", name, "unsupported_parameter")

    def samplings(self, most: int) -> list[Sampling]:
        """Return the sampling of each answer to one prompt: seeds count up from the request's, or are random.

        Args:
            most: the most tokens of an answer.

        Raises:
            ServingError: a stop text is empty, or there are too many (400).
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MOST_STOPS or not all(stop):
            raise ServingError(400, f"stop: must be at most {MOST_STOPS} texts that are not empty", "stop")
        first = secrets.randbits(62) if self.seed is None else self.seed
        return [
            Sampling(
                max_new_tokens=max(1, most),
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=max(0, self.top_k or 0),
                repetition_penalty=self.repetition_penalty or 1.0,
                seed=(first + index) % 2**63,
                stop=stop,
            )
            for index in range(self.count)
        ]


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    audio: Any = None
    function_call: Any = None
    refusal: Any = None
    tool_calls: Any = None

    @field_validator("audio", "function_call", "refusal", "tool_calls")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> None:
        """Refuse what would be a part of the prompt if the server knew it."""
        if value:
            raise ValueError("is not supported by this server")

    def turn(self) -> dict[str, str]:
        """Return it as chat templates read it; they know the developer as the system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return turn if self.name is None else turn | {"name": self.name}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    def refuse_unsupported(self) -> None:
        """Refuse more than the fields that both kinds of requests share."""
        super().refuse_unsupported()
        if self.top_logprobs is not None and not self.logprobs:
            raise ServingError(400, "top_logprobs: must not be given without logprobs=true", "top_logprobs")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            name = "max_completion_tokens"
            raise ServingError(400, f"{name}={self.max_completion_tokens}: max_tokens says {self.max_tokens}", name)

    def asked(self) -> str:
        """Return the text by which an adapter is chosen: what the user said last."""
        turns = [message.turn() for message in self.messages]
        return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), turns[-1]["content"])


Tokens = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or tokens."""
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if many else [self.prompt]  # type: ignore[arg-type,list-item]

    def asked(self) -> str:
        """Return the text by which an adapter is chosen.

        Raises:
            ServingError: the prompt is not one text (400).
        """
        if isinstance(self.prompt, str):
            return self.prompt
        raise ServingError(400, "prompt: must be one text, by which model='auto' chooses an adapter", "prompt")


class LoadRequest(_Body):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="ignore")
    lora_name: str
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadRequest(_Body):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="ignore")
    lora_name: str
