"""The HTTP API's request bodies, field by field.

Types are strict: `"1"` is not 1 and `true` is not 1. What this module does not name is refused, and
never reaches an engine. `parsing` reads a body into these models, `calls` makes them a `ChatCall`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag

from serve_app.config import ModelConfig
from serve_app.config.tools import ToolConfig

IGNORED_PARAMETERS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
"""Parameters of OpenAI's API that are checked, accepted and not acted on."""

ROUTED_MODEL = "atlas"
"""The model name that routes."""

MAX_LISTED_MESSAGES = 2_048
"""Of a body; the limits of the configuration lie below."""
MAX_LISTED_TOOLS = 1_024
"""The same."""

_NAME = r"^[A-Za-z0-9_-]{1,64}$"


class Wire(BaseModel):
    """Strict types, finite numbers, no unknown fields.

    Every list has a longest length and ends its check with the first wrong item: a body of nothing
    but errors is refused in a few milliseconds.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Wire):
    """A piece of text."""

    type: Literal["text"]
    text: str


class PictureUrl(Wire):
    """A picture as a URL."""

    url: str
    """`data:image/png;base64,…`, or jpeg, webp, gif. Nothing is fetched."""
    detail: Literal["auto", "low", "high"] | None = None
    """How closely the model looks, where it knows the word."""


class PicturePart(Wire):
    """A picture; in user messages only."""

    type: Literal["image_url"]
    image_url: PictureUrl


def _content_kind(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=256, fail_fast=True), Tag("parts")],
    Discriminator(_content_kind),
]
UserPart = Annotated[TextPart | PicturePart, Field(discriminator="type")]
UserContent = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[UserPart], Field(min_length=1, max_length=256, fail_fast=True), Tag("parts")],
    Discriminator(_content_kind),
]
MessageName = Annotated[str, Field(pattern=_NAME)]


class InstructionMessage(Wire):
    """Instructions to the model."""

    role: Literal["system", "developer"]
    content: Content
    name: MessageName | None = None


class UserMessage(Wire):
    """What the user says."""

    role: Literal["user"]
    content: UserContent
    name: MessageName | None = None


class FunctionCall(Wire):
    """A function the model wanted called."""

    name: Annotated[str, Field(pattern=_NAME)]
    arguments: str


class MessageToolCall(Wire):
    """One tool call of an assistant message."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Wire):
    """What the model said before, with whatever fields a completion's message carries."""

    role: Literal["assistant"]
    content: Content | None = None
    name: MessageName | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=128, fail_fast=True)] | None = (
        None
    )
    refusal: str | None = None
    """Accepted, not used."""
    annotations: Annotated[list[Any], Field(max_length=1024)] | None = None
    """Accepted, not used."""
    audio: None = None
    """Accepted as null."""
    function_call: None = None
    """Accepted as null."""
    reasoning: str | None = None
    """Accepted, not used."""
    reasoning_content: str | None = None
    """Accepted, not used."""


class ToolMessage(Wire):
    """The result of a tool call the caller made."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(min_length=1, max_length=128)]


Message = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionDefinition(Wire):
    """A function of the caller's."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: Annotated[str, Field(max_length=8192)] | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object."""
    strict: bool | None = None


class ToolDefinition(Wire):
    """A tool of the caller's; passed through to the chosen model."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Wire):
    """Names a function."""

    name: Annotated[str, Field(pattern=_NAME)]


class NamedToolChoice(Wire):
    """Demands one tool."""

    type: Literal["function"]
    function: FunctionName


class JsonSchemaFormat(Wire):
    """The schema of a structured answer."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: Annotated[str, Field(max_length=8192)] | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaResponseFormat(Wire):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaResponseFormat, Field(discriminator="type")
]


class StreamOptions(Wire):
    """How a stream ends."""

    include_usage: bool | None = None
    """Send a last chunk with `usage` and no choices."""
    include_obfuscation: bool | None = None
    """Accepted, not used."""


ModelName = Annotated[str, Field(min_length=1, max_length=200)]
"""`atlas`, a model, a pair, or a pattern."""
Alpha = Annotated[float, Field(ge=0, le=1)]
MaxCostUsd = Annotated[float, Field(ge=0)]
DeadlineS = Annotated[float, Field(ge=0.01)]
PolicyVersion = Annotated[int, Field(ge=0, lt=2**31)]


class AtlasOptions(Wire):
    """What this endpoint knows beyond OpenAI's API."""

    alpha: Alpha | None = None
    """Cost-quality dial; 0 = quality only, `null` = the server's default."""
    max_cost_usd: MaxCostUsd | None = None
    """Dollars the request may cost."""
    deadline_s: DeadlineS | None = None
    """Seconds from arrival to the last byte."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Pairs tried at most: the choice and its fallbacks, or the learned policy's steps."""
    models: Annotated[list[str], Field(min_length=1, max_length=256, fail_fast=True)] | None = None
    """Model ids the router may choose from."""
    tools: Annotated[list[str], Field(min_length=1, max_length=256, fail_fast=True)] | None = None
    """Tool ids the router may choose from; `none` is one."""
    not_models: Annotated[list[str], Field(max_length=256, fail_fast=True)] | None = None
    """Model ids that are not used."""
    not_tools: Annotated[list[str], Field(max_length=256, fail_fast=True)] | None = None
    """Tool ids that are not used."""
    deterministic: bool = False
    """Decide and answer so that the same request has the same result again: temperature 0, a seed
    made of the body, no exploration, nothing that was learned since the policy was fitted."""
    policy_version: PolicyVersion | None = None
    """With `deterministic`: the policy that decides, `null` = the one that serves."""
    pattern: None = None
    """Reserved."""
    session: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:@/-]{1,128}$")] | None = None
    """Name of the conversation that the request continues, of your own choice: it stays with who
    answered it last while switching would cost more than it gains."""
    explain: bool = False
    """Return every candidate with its score."""
    events: bool = False
    """With `stream`: tell of each decision, call and check as it begins and ends, in chunks without
    choices."""


Penalty = Annotated[float, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


def _stop_kind(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


class ChatRequest(Wire):
    """The body of `POST /v1/chat/completions` and `POST /v1/route`."""

    model: ModelName
    """`atlas` routes; `<model_id>` or `<model_id>@<tool_id>` pins."""
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MAX_LISTED_MESSAGES, fail_fast=True)
    ]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""
    n: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[
            Annotated[StopText, Tag("one")]
            | Annotated[
                list[StopText], Field(min_length=1, max_length=4, fail_fast=True), Tag("many")
            ],
            Discriminator(_stop_kind),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Needs `logprobs`."""
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[list[ToolDefinition], Field(max_length=MAX_LISTED_TOOLS, fail_fast=True)] | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Needs `stream`."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Accepted, not used."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Accepted, not used."""
    store: bool | None = None
    """Accepted, not used."""
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    """Accepted, not used."""
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """Accepted, not used."""
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    """Accepted, not used."""
    atlas: AtlasOptions | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether the caller wants a last chunk with `usage`."""
        return self.stream_options is not None and self.stream_options.include_usage is True


class ModelSubmission(RootModel[ModelConfig]):
    """The body of `POST /v1/admin/models` and `PUT /v1/admin/models/{model_id}`."""


class ToolSubmission(Wire):
    """The body of `POST /v1/admin/tools`."""

    tool: ToolConfig
    models: Annotated[list[str], Field(max_length=1000, fail_fast=True)] | None = None
    """Models that may work with it; all of them where none is named."""


class ToolAcceptance(Wire):
    """The body of `POST /v1/admin/tools/{tool_id}/accept`."""

    function: Annotated[str, Field(min_length=1, max_length=128)]
    """The function, by the server's own name."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of the definition that was looked at, as `GET /v1/admin/tools` told it."""


class FeedbackRequest(Wire):
    """The body of `POST /v1/feedback`."""

    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """As the completion's `x-request-id` header and `atlas.request_id` said."""
    score: Annotated[float, Field(allow_inf_nan=False)]
    """0 = useless, 1 = right; clipped to that range."""
    comment: Annotated[str, Field(max_length=4096)] | None = None
