"""Names of attributes in spans.

`gen_ai.*` by the OpenTelemetry semantic conventions for generative AI, release v0.1.0 of
`open-telemetry/semantic-conventions-genai`, where they live since they left the main repository;
all are in development there. `http.*` and `error.type` are stable names of the main repository.
`atlas.*` are our own.
"""

from __future__ import annotations

from typing import Final

GENAI_CONVENTIONS: Final = "0.1.0"
"""Release of the conventions that the names are of."""

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
AGENT: Final = "gen_ai.agent.name"
"""Of a candidate, and of a pattern: the release has no name of its own for workflows."""
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_ID: Final = "gen_ai.response.id"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_RESULT: Final = "gen_ai.tool.call.result"
DATA_SOURCE: Final = "gen_ai.data_source.id"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
EVALUATION: Final = "gen_ai.evaluation.result"
"""Name of an event."""
EVALUATION_NAME: Final = "gen_ai.evaluation.name"
EVALUATION_SCORE: Final = "gen_ai.evaluation.score.value"
EVALUATION_LABEL: Final = "gen_ai.evaluation.score.label"

CHAT: Final = "chat"
EMBEDDINGS: Final = "embeddings"
EXECUTE_TOOL: Final = "execute_tool"
INVOKE_AGENT: Final = "invoke_agent"
INVOKE_WORKFLOW: Final = "invoke_workflow"
PLAN: Final = "plan"
RETRIEVAL: Final = "retrieval"
"""Values of `gen_ai.operation.name`."""

ERROR_TYPE: Final = "error.type"
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"

ATLAS: Final = "atlas."
COST_USD: Final = "atlas.cost_usd"
REQUEST_ID: Final = "atlas.request_id"
