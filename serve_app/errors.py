"""Every error atlas-serve raises on purpose.

AtlasError
├── RequestError                 the caller's fault; 4xx
│   ├── InvalidRequest           400, a field is wrong
│   │   ├── KeyRequired          400, a call acts once, and the request has no Idempotency-Key
│   │   └── UnfitForPair         400, this pair cannot take the request; another may
│   │       ├── ContextTooLong   the model's context is shorter than the conversation
│   │       └── BudgetExceeded   the next call may use more than the request has left
│   │           └── QuotaExceeded 429, more than the limits of its API key leave
│   ├── Unauthorized             401, no or unknown API key
│   ├── Forbidden                403, the key lacks the scope, or the thing is someone else's
│   ├── NotFound                 404, unknown model, pair, request id, path
│   ├── MethodNotAllowed         405, the path does not know this method
│   ├── Misdirected              421, the `Host` is none that is served here
│   ├── UnsupportedMediaType     415, the body is not plain JSON
│   ├── RequestTooLarge          413, the body is over a limit
│   │   └── HeadersTooLarge      431, the headers are
│   ├── RequestTimeout           408, the body did not arrive in time
│   ├── Conflict                 409, said already
│   │   ├── KeyInFlight          409, the request with this Idempotency-Key is under way
│   │   ├── OutcomeUnknown       409, it began an effect, and how it ended is not known
│   │   ├── CandidateGone        409, what a request chose is no more, so it cannot be replayed
│   │   └── AnswerNotKept        409, it was answered, and the answer was too large to keep
│   ├── KeyReused                422, this Idempotency-Key came with another request
│   └── RateLimited              429, over the caller's or the server's limit
├── ServiceError                 ours; 5xx
│   ├── NoCandidate              503, nothing in the pool can serve this request now
│   ├── EngineError              502, a model application failed
│   │   ├── EngineBusy           503, the model asks for a pause
│   │   ├── EngineUnavailable    a remote endpoint failed in a way that may pass
│   │   ├── NoAnswer             the model calls its tool again and again
│   │   │   └── UnreadableCall   the model wrote a tool call that cannot be read
│   │   └── ReplicaDied          the process that worked on it is no more
│   ├── QuotaUnknown             503, the store cannot say what the limits of an API key leave
│   ├── EffectRefused            503, an effect could not be put on record, and was not begun
│   └── DeadlineExceeded         504, the request's time is up
├── ToolError
│   ├── ToolRetry                the model may try again: its arguments were wrong
│   └── ToolFailed               final for this step
│       ├── ToolTimeout          the tool ran past its time
│       └── ToolWorkerDied       the process that ran it is no more
├── ConfigError                  a configuration that cannot work
├── ClusterDied                  Ray's own processes have ended beneath the graph
├── SnapshotError                a router snapshot that is damaged, foreign or does not fit
├── TrainingStopped              told to stop before its end
├── PromotionRefused             409, a candidate policy that is not surely as good
└── StoreError                   the store refused or is away
    └── StoreAway                no connection to it could be had

All of them are rebuilt from `args` alone, because they cross process borders by pickle. A message
says what was wrong, shows the value, and never holds a path, a secret or a stack trace: the gateway
sends it to the caller.
"""

import re


class AtlasError(Exception):
    """Base of everything raised on purpose."""

    status_code = 500
    """HTTP status the gateway answers with."""
    error_type = "server_error"
    """`error.type` in OpenAI's error shape."""
    code: str | None = None
    """`error.code` in OpenAI's error shape."""
    stop: str | None = None
    """Why the request ended that failed with it, a `schemas.StopReason`; `None`: no run had begun,
    and the error's class does not tell."""

    @property
    def message(self) -> str:
        """The text for the caller."""
        return str(self.args[0]) if self.args else type(self).__name__

    @property
    def param(self) -> str | None:
        """The request field at fault, where there is one (second argument)."""
        return self.args[1] if len(self.args) > 1 else None

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which trying again may help; `None`: not known."""
        return None


class RequestError(AtlasError):
    """The caller's fault."""

    status_code = 400
    error_type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A field of the request is wrong. Arguments: message, field."""


class KeyRequired(InvalidRequest):
    """A call acts once, and the request has no `Idempotency-Key`."""

    code = "idempotency_key_required"


class UnfitForPair(InvalidRequest):
    """This pair cannot take the request, and another one may."""


class ContextTooLong(UnfitForPair):
    """The conversation is longer than the model's context."""

    code = "context_length_exceeded"


class BudgetExceeded(UnfitForPair):
    """The next call may use more than is left. Arguments: message, field, amount needed, cap."""

    code = "max_cost_exceeded"

    @property
    def needed(self) -> float:
        """Amount that would have been enough for the call, in the cap's unit."""
        return float(self.args[2]) if len(self.args) > 2 else 0.0

    @property
    def cap(self) -> str:
        """Which cap would be passed: a field of `budget.Caps`."""
        return str(self.args[3]) if len(self.args) > 3 else "usd"


class QuotaExceeded(BudgetExceeded):
    """The limits of the API key leave less than the next call may use.

    Arguments: those of `BudgetExceeded`, and the seconds until a limit begins anew.
    """

    status_code = 429
    error_type = "insufficient_quota"
    code = "insufficient_quota"

    @property
    def retry_after_s(self) -> float:
        """Until the limit begins anew."""
        return float(self.args[4]) if len(self.args) > 4 else 1.0


class Unauthorized(RequestError):
    """No API key, or an unknown one."""

    status_code = 401
    error_type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(RequestError):
    """The key lacks the scope, or the object belongs to another caller."""

    status_code = 403
    error_type = "permission_error"


class NotFound(RequestError):
    """No such model, pair, request or path."""

    status_code = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """The `model` field names nothing in the pool."""

    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method. Arguments: message, `None`, allowed methods."""

    status_code = 405
    code = "method_not_allowed"

    @property
    def allow(self) -> str:
        """The methods that the path takes, as the header `Allow` has them."""
        return self.args[2] if len(self.args) > 2 else ""


class Misdirected(RequestError):
    """The `Host` of the request is none that is served here."""

    status_code = 421
    code = "host_not_served"


class UnsupportedMediaType(RequestError):
    """The body is not plain `application/json`."""

    status_code = 415


class RequestTimeout(RequestError):
    """The request's body did not arrive in time."""

    status_code = 408


class Conflict(RequestError):
    """Said already, and it stands."""

    status_code = 409


class KeyInFlight(Conflict):
    """The request with this `Idempotency-Key` is under way.

    Arguments: message, `None`, seconds after which trying again may help.
    """

    code = "idempotency_key_in_flight"

    @property
    def retry_after_s(self) -> float:
        """Until the claim on the key is renewed, or the key is free."""
        return self.args[2] if len(self.args) > 2 else 1.0


class OutcomeUnknown(Conflict):
    """The request with this `Idempotency-Key` began an effect, and how it ended is not known."""

    code = "outcome_unknown"


class CandidateGone(Conflict):
    """A request cannot be replayed: what it chose is not in the pool any more."""

    code = "candidate_gone"


class AnswerNotKept(Conflict):
    """The request with this `Idempotency-Key` was answered, and the answer was not kept."""

    code = "answer_not_kept"


class KeyReused(RequestError):
    """This `Idempotency-Key` came with another request before."""

    status_code = 422
    code = "idempotency_key_reused"


class RequestTooLarge(RequestError):
    """The body is over its limit."""

    status_code = 413


class HeadersTooLarge(RequestTooLarge):
    """The headers are over their limit."""

    status_code = 431


class RateLimited(RequestError):
    """Too many requests, from this caller or in all.

    Arguments: message, `None`, seconds after which trying again may help (1 if not given).
    """

    status_code = 429
    error_type = "rate_limit_error"
    code = "rate_limit_exceeded"

    @property
    def retry_after_s(self) -> float:
        """Always known."""
        return self.args[2] if len(self.args) > 2 else 1.0


class ServiceError(AtlasError):
    """Ours, not the caller's."""


class NoCandidate(ServiceError):
    """Nothing in the pool can serve this request now."""

    status_code = 503
    code = "no_candidate"

    @property
    def retry_after_s(self) -> float:
        """About as long as the pool takes to change."""
        return 5.0


class EngineError(ServiceError):
    """A model application failed or answered with an error."""

    status_code = 502
    code = "engine_error"


class EngineBusy(EngineError):
    """The model asks for a pause.

    Arguments: message, `None`, seconds of the pause that are left.
    """

    status_code = 503
    code = "engine_busy"

    @property
    def retry_after_s(self) -> float | None:
        """What is left of the pause."""
        return self.args[2] if len(self.args) > 2 else None


class EngineUnavailable(EngineError):
    """A remote endpoint failed in a way that may pass, and asks for no pause."""


class NoAnswer(EngineError):
    """The model calls its tool again and again: the engine works, and what it writes is none."""


class UnreadableCall(NoAnswer):
    """What the model wrote is a tool call that cannot be read, and so no answer."""


class ReplicaDied(EngineError):
    """The process that worked on a request is no more, and what it said nobody heard."""


class QuotaUnknown(ServiceError):
    """The store cannot be asked what the limits of an API key leave."""

    status_code = 503
    code = "quota_unknown"

    @property
    def retry_after_s(self) -> float:
        """About as long as a database takes to come back."""
        return 5.0


class EffectRefused(ServiceError):
    """An effect could not be put on record before it began, so it was not begun."""

    status_code = 503
    code = "effect_refused"

    @property
    def retry_after_s(self) -> float:
        """About as long as a database takes to come back."""
        return 5.0


class DeadlineExceeded(ServiceError):
    """The request's time is up."""

    status_code = 504
    error_type = "timeout_error"
    code = "deadline_exceeded"
    stop = "deadline"


class ToolError(AtlasError):
    """A tool did not give a result."""


class ToolRetry(ToolError):
    """The arguments were wrong; the model may try again."""


class ToolFailed(ToolError):
    """Final for this step."""


class ToolTimeout(ToolFailed):
    """The tool ran past its time."""


class ToolWorkerDied(ToolFailed):
    """The process that ran the tool is no more, and what it did nobody heard."""


class ClusterDied(AtlasError):
    """Ray's own processes have ended beneath the graph; it has to be started again."""


class ConfigError(AtlasError, ValueError):
    """A configuration that cannot work."""


class SnapshotError(AtlasError, ValueError):
    """A router snapshot that is damaged, foreign or does not fit."""


class TrainingStopped(AtlasError):
    """Training was told to stop before its end; it can go on from its last checkpoint."""


class PromotionRefused(AtlasError):
    """A candidate policy that is worse than the serving one, or not surely as good."""

    status_code = 409


class StoreError(AtlasError):
    """The store refused or is away."""

    status_code = 503

    @property
    def retry_after_s(self) -> float:
        """About as long as a database takes to come back."""
        return 5.0


class StoreAway(StoreError):
    """No connection to the store could be had; what was asked of it was not begun."""


def failure_reason(message: str) -> str:
    """The one line of a message or traceback that says why, without the server's paths."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"^[\w.]*(Error|Exception|Refused|Failed)\w*:", line)
    ]
    line = (errors or lines or ["unknown"])[-1]
    return re.sub(r"(?<![\w.])/[\w./@+-]+", "<path>", line)[:300]
