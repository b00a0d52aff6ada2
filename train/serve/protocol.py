"""What clients send: OpenAI's requests, and those of steering.

A field of OpenAI's that is not supported is accepted with the value that changes nothing. Each field's description is a
noun phrase: it is what an error message says is allowed, and what the OpenAPI description shows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_TOP = 20
MAX_STRENGTH = 1000.0
MAX_COUNT = 1 << 31
"""Above any number of tokens: the server's own limits are checked later, with a message that names its options."""

UNSUPPORTED = "nothing else, since the field is not supported"


def _only(allowed: str, **limits: Any) -> Any:
    """A field that is not supported, with the value that is accepted all the same."""
    return Field(description=f"{allowed} and {UNSUPPORTED}", **limits)


def conflict(param: str, message: str) -> PydanticCustomError:
    """The error for fields that do not go together; `param` is the one to change."""
    return PydanticCustomError("conflict", "{message}", {"param": param, "message": message})


def _no_number(value: Any) -> Any:
    """Refuse 0, which a literal False would take for itself."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("a number is not false")
    return value


No = Annotated[Literal[False], BeforeValidator(_no_number)]
Name = Annotated[str, Field(min_length=1, max_length=256, description="a name from GET /v1/models")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_COUNT)]], Field(min_length=1)]
Zero = Annotated[float | None, _only("0", ge=0, le=0)]
Ignored = Annotated[
    str | None, Field(max_length=512, description="a text of at most 512 characters, which is not used")
]
Factor = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
Strength = Annotated[
    Factor | Annotated[dict[str, Factor], Field(max_length=256)] | None,
    Field(
        description=f"a factor of the steering from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g} (0 the base model, 1 as "
        "trained), or an object with such a factor for each slot by its name"
    ),
]
NewTokens = Annotated[int | None, Field(ge=1, lt=MAX_COUNT, description="a number of tokens from 1")]


class Body(BaseModel):
    """Strict about types, as OpenAI is: "5" is no number, and 1 is no Boolean."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """Settings of a stream."""

    include_usage: Annotated[bool | None, Field(description="whether a last chunk has the numbers of tokens")] = None
    include_obfuscation: Annotated[bool | None, Field(description="true or false, which changes nothing")] = None


class Generate(Body):
    """What requests for a completion and for a chat completion have in common."""

    model: Name
    temperature: Annotated[float | None, Field(ge=0, le=2, description="a number from 0 (greedy) to 2")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="a number from 0 to 1")] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=MAX_COUNT, description="a number of tokens; 0 or -1 for all")] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description=f"a number from 1 to {MAX_CHOICES}")] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63, description="a 64-bit integer")] = None
    stop: Annotated[
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STOPS)]
        | None,
        Field(description=f"a text of at most 1,024 characters, or a list of at most {MAX_STOPS} of them"),
    ] = None
    stream: Annotated[bool | None, Field(description="whether the answer comes piece by piece")] = None
    stream_options: Annotated[
        StreamOptions | None, Field(description='an object such as {"include_usage": true}, with stream')
    ] = None
    steering_strength: Strength = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, float] | None, _only("an empty object", max_length=0)] = None
    user: Ignored = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_stream(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "'stream_options' is allowed only with 'stream': true")
        return self


class CompletionRequest(Generate):
    """POST /v1/completions: continue a prompt as it is."""

    prompt: Annotated[
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
        Field(description=f"a text, a list of token ids, or a list of at most {MAX_PROMPTS:,} of either"),
    ]
    max_tokens: Annotated[
        int | None, Field(ge=0, lt=MAX_COUNT, description="a number of tokens from 1, or 0 with echo")
    ] = None
    echo: Annotated[bool | None, Field(description="whether the answer begins with the prompt")] = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP, description=f"a number from 0 to {MAX_TOP}")] = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="the same number as n")] = None
    suffix: Annotated[str | None, _only("an empty text", max_length=0)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, also where there is one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def new_tokens(self) -> int:
        """Number of tokens to generate at most."""
        return 16 if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "'max_tokens' must be at least 1; 0 is allowed only with 'echo': true")
        if self.best_of is not None and self.best_of != self.choices:
            raise conflict("best_of", f"'best_of' must be equal to 'n' ({self.choices}): no answers are compared")
        return self


class TextPart(Body):
    """A part of a message."""

    type: Annotated[Literal["text"], Field(description='"text": other kinds of content are not supported')]
    text: Annotated[str, Field(description="a text")]


class Message(Body):
    """A message of a conversation; what an answer's message has besides may be sent back."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        Field(description="system (or developer), user or assistant"),
    ]
    content: Annotated[
        str | Annotated[list[TextPart], Field(min_length=1, max_length=256)],
        Field(description='a text, or a list of parts {"type": "text", "text": ...}'),
    ]
    name: Ignored = None
    refusal: Annotated[None, _only("null")] = None
    audio: Annotated[None, _only("null")] = None
    function_call: Annotated[None, _only("null")] = None
    tool_calls: Annotated[list[Any] | None, _only("an empty list", max_length=0)] = None
    annotations: Annotated[list[Any] | None, _only("an empty list", max_length=0)] = None

    def plain(self) -> dict[str, str]:
        """Role and content as chat templates take them."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MAX_MESSAGES, description=f"a list of 1 to {MAX_MESSAGES:,} messages"),
]


class ResponseFormat(Body):
    """The form of an answer."""

    type: Annotated[Literal["text"], _only('"text"')]


class ChatRequest(Generate):
    """POST /v1/chat/completions: answer a conversation."""

    messages: Messages
    max_completion_tokens: NewTokens = None
    max_tokens: NewTokens = None
    logprobs: Annotated[bool | None, Field(description="whether the tokens' log-probabilities are wanted")] = None
    top_logprobs: Annotated[
        int | None, Field(ge=0, le=MAX_TOP, description=f"a number from 0 to {MAX_TOP}, with logprobs")
    ] = None
    response_format: Annotated[ResponseFormat | None, _only('{"type": "text"}')] = None
    tools: Annotated[list[Any] | None, _only("an empty list", max_length=0)] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, _only('"none" or "auto"')] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="true or false, which changes nothing")] = None
    functions: Annotated[list[Any] | None, _only("an empty list", max_length=0)] = None
    function_call: Annotated[Literal["none", "auto"] | None, _only('"none" or "auto"')] = None
    modalities: Annotated[list[Literal["text"]] | None, _only('["text"]', max_length=1)] = None
    audio: Annotated[None, _only("null")] = None
    prediction: Annotated[None, _only("null")] = None
    reasoning_effort: Annotated[Literal["none"] | None, _only('"none"')] = None
    verbosity: Annotated[Literal["medium"] | None, _only('"medium"')] = None
    web_search_options: Annotated[None, _only("null")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, _only('"auto" or "default"')] = None
    store: Annotated[No | None, _only("false")] = None
    metadata: Annotated[
        dict[str, Any] | None, Field(max_length=16, description="an object of at most 16 fields, which is not used")
    ] = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None

    @property
    def new_tokens(self) -> int | None:
        """Number of tokens to generate at most; None if the request does not say."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int:
        """Number of likely tokens to report at each step."""
        return self.top_logprobs or 0

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise conflict("top_logprobs", "'top_logprobs' is allowed only with 'logprobs': true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise conflict("max_tokens", "'max_tokens' and 'max_completion_tokens' differ; give one of them")
        return self


class EffectsRequest(Body):
    """POST /v1/effects: how far steering moves each token of a prompt and an answer, and what it makes likely."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: Name
    prompt: Annotated[str | TokenIds | None, Field(description="a text or a list of token ids")] = None
    messages: Annotated[Messages | None, Field(description="a list of messages, in place of a prompt")] = None
    answer: Annotated[str, Field(description="a text that follows the prompt")] = ""
    steering_strength: Strength = None
    top_tokens: Annotated[int, Field(ge=0, le=MAX_TOP, description=f"a number from 0 to {MAX_TOP}")] = 5

    @model_validator(mode="after")
    def _check_together(self) -> EffectsRequest:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give either 'prompt' or 'messages'")
        return self


AdapterName = Annotated[str, Field(min_length=1, max_length=256, description="a name of 1 to 100 printable characters")]


class LoadRequest(Body):
    """POST /v1/load_lora_adapter, as vLLM names it: serve one more steering file."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, description="a path on the server")]
    load_inplace: Annotated[No, _only("false")] = False


class UnloadRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: AdapterName
    lora_int_id: Annotated[int | None, Field(description="a number, which is not used")] = None
