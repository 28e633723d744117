"""The HTTP ingress: its limits, and who may call."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serve_app.config.base import BaseConfig
from serve_app.config.deployment import DeploymentConfig
from serve_app.environment import MAX_REQUEST_S

_HOST_PATTERN = r"^(\*\.)?[a-z0-9]([a-z0-9._-]*[a-z0-9])?$|^[0-9a-f.]*:[0-9a-f:.]*$"
"""A name or an address in lower case, without port or brackets."""


class LimitsConfig(BaseConfig):
    """Bounds on what one caller may send; refused at the edge."""

    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    max_header_bytes: int = Field(default=16 << 10, ge=1024)
    max_json_depth: int = Field(default=32, ge=4)
    max_messages: int = Field(default=256, ge=1, le=2_048)
    max_prompt_chars: int = Field(default=400_000, ge=1)
    max_pictures: int = Field(default=8, ge=0, le=64)
    """Pictures in all messages of a request; 0 takes none."""
    max_picture_bytes: int = Field(default=4 << 20, ge=1024)
    """Of one picture, decoded. In a body, a picture takes a third more: `max_body_bytes` has to be
    larger for large ones."""
    max_picture_pixels: int = Field(default=16_000_000, ge=1, le=32_000_000)
    """Of one picture; of a moving one, of its first frame."""
    max_tools: int = Field(default=64, ge=0, le=1_024)
    max_n: int = Field(default=8, ge=1)
    max_completion_tokens: int = Field(default=8192, ge=1)
    body_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds from the first byte of a request to the last of its body."""
    default_deadline_s: float = Field(default=60.0, gt=0)
    max_deadline_s: float = Field(default=600.0, gt=0, le=MAX_REQUEST_S)
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests one gateway replica works on; more get 429 with Retry-After."""
    adapt_to_load: bool = True
    """Whether fewer are taken while more would only wait: chats and decisions are refused with 429
    that others would be slowed down by beyond `max_slowdown`."""
    max_slowdown: float = Field(default=1.5, gt=1, le=10)
    """How many times longer a first byte may take, as a rule, than on an idle deployment."""
    soon_enough_s: float = Field(default=0.25, ge=0, le=10)
    """Seconds that a first byte may take in any case: nobody is refused for the sake of less."""
    initial_ongoing_requests: int = Field(default=64, ge=1)
    """Chats and decisions a new gateway replica takes at once, until load has told more."""
    min_ongoing_requests: int = Field(default=16, ge=1)
    """Chats and decisions that are always taken, however slow."""
    max_tool_rounds: int = Field(default=3, ge=1, le=16)
    """Replies with tool calls in them that a model may give before it must answer."""
    max_calls_per_reply: int = Field(default=8, ge=1, le=128)
    """Tool calls of one reply that are run; the model is told which were not."""
    max_tool_calls: int = Field(default=32, ge=1, le=1024)
    """Tool calls of one request, its fallbacks and the nodes of its pattern included."""
    max_steps: int = Field(default=4, ge=1, le=16)
    """Pairs tried for one request: the choice and its fallbacks, or the steps of the learned
    policy, its thoughts included."""
    feedback_per_minute: float = Field(default=600.0, gt=0)
    """Verdicts one caller may give on average, at each gateway replica; a tenth of it at once."""
    max_jobs: int = Field(default=8, ge=1)
    """Jobs of the learning loop under way at once in the whole deployment; more get 429."""
    requests_per_minute_per_key: float | None = Field(default=None, gt=0)
    """Chats and decisions that one API key may ask for on average, at each gateway replica; a tenth
    of it, and at least one, at once. `None`: unlimited."""
    ongoing_requests_per_key: int | None = Field(default=None, ge=1)
    """Requests of one API key that each gateway replica works on at once, admin calls aside.
    `None`: unlimited while no other key calls. Whatever is set: within a minute of another key's
    request a key gets at most three quarters of the places, of all and of those for chats."""
    max_bodies_bytes: int = Field(default=128 << 20, ge=1024)
    """Bytes of the request bodies that each gateway replica holds at once, from their arrival to
    the end of their requests, admin calls aside; what is more gets 429."""

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes ({self.max_bodies_bytes}) is below max_body_bytes "
                f"({self.max_body_bytes}): no body of that size could ever be read"
            )
        return self


class AuthConfig(BaseConfig):
    """Who may call."""

    mode: Literal["open", "required"] = "open"
    """`open` needs no key: it is served on a loopback address only, to callers on the same machine
    that name a loopback host. `required` asks for a key from the store."""


class IdempotencyConfig(BaseConfig):
    """What is kept of requests that come with an `Idempotency-Key`."""

    keep_s: float = Field(default=86_400.0, ge=60)
    """Seconds from a key's first request for which the key and its answer are kept."""
    max_keys: int = Field(default=10_000, ge=1)
    """Keys that are kept for one API key; a request with one more gets 429."""
    max_answer_bytes: int = Field(default=64 << 10, ge=0)
    """Bytes of an answer that are kept at most; a request with a longer one is remembered, and
    gets 409 when it comes again."""
    lease_s: float = Field(default=10.0, ge=1, le=60)
    """Seconds that a gateway holds a key for its request, and renews while it works on it: what a
    gateway held that died is free after that, or its outcome unknown."""


class GatewayDeploymentConfig(DeploymentConfig):
    """Resources and scaling of the gateway, which refuses by itself what is too much."""

    max_ongoing_requests: int = Field(default=1024, ge=1)
    """Requests Serve hands to a replica at once; more than it works on, so that it can refuse."""


class GatewayConfig(BaseConfig):
    """The HTTP ingress."""

    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    allowed_hosts: tuple[Annotated[str, Field(pattern=_HOST_PATTERN)], ...] = ()
    """Names or addresses, without port, that a request may have in its `Host` header where keys are
    required; `*.example.com` stands for every subdomain. Empty: any. Probes are answered under
    any."""
    mcp: bool = True
    """Whether `/mcp` serves MCP clients: with `ask`, `route`, and the tools marked `exposed`."""
    breaker_failures: int = Field(default=5, ge=1, le=1_000_000)
    """Calls in a row that fail by a model's own fault before its breaker opens, for each replica:
    then no decision names the model until it answers a probe."""

    console: bool = True
    """Whether `/console` shows pages for people, to who has a key with the scope `admin`."""
    idempotency: IdempotencyConfig = IdempotencyConfig()
    deployment: GatewayDeploymentConfig = GatewayDeploymentConfig()

    @model_validator(mode="after")
    def _hosts_are_for_keys(self) -> Self:
        if self.allowed_hosts and self.auth.mode == "open":
            raise ValueError(
                "allowed_hosts has no effect while auth.mode is 'open', which answers loopback "
                "names only; leave it out, or set auth.mode to 'required'"
            )
        return self

    @model_validator(mode="after")
    def _can_refuse(self) -> Self:
        if self.deployment.max_ongoing_requests <= self.limits.max_ongoing_requests:
            raise ValueError(
                "deployment.max_ongoing_requests has to be above limits.max_ongoing_requests: "
                "what the gateway does not see waits, and gets no 429"
            )
        return self
