"""The routes, each declared once: who may call it, its handler, and what it takes and answers.

The edge finds a request's route in this table, and the OpenAPI document is written from it.
"""

from __future__ import annotations

from serve_app.config import PriceConfig
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.rules import RulesSubmission
from serve_app.gateway import shapes
from serve_app.gateway.admin.pool import PoolAdmin
from serve_app.gateway.chat.trajectory import Trajectory
from serve_app.gateway.chat.wire import (
    ChatRequest,
    FeedbackRequest,
    ModelSubmission,
    ToolAcceptance,
    ToolSubmission,
)
from serve_app.gateway.console.pages import Console
from serve_app.gateway.edge.operation import DocumentedAnswer, Operation
from serve_app.gateway.edge.routes import PUBLIC, Endpoint, Handler
from serve_app.gateway.handlers import Handlers
from serve_app.gateway.usage import KeyUsage
from serve_app.jobs import JobSubmission
from serve_app.store import Scope


def endpoints(
    api: Handlers,
    pool: PoolAdmin,
    openapi: Handler,
    mcp: Handler | None,
    console: Console | None,
) -> list[Endpoint]:
    """Every route of the API; of two that match a request, the first answers it.

    Args:
        api: Answers callers, and admins on the learning loop.
        pool: Answers admins on the pool.
        openapi: Answers with the document that is written from these.
        mcp: Answers MCP clients; `None`: nothing does.
        console: Shows pages to people; `None`: nothing does.
    """
    return [
        *_chat(api),
        *([] if mcp is None else [Endpoint("POST", "/mcp", mcp, Scope.CHAT, None)]),
        *_models(pool),
        *_tools(pool),
        *_patterns(pool),
        *_rules(pool),
        *_learning(api),
        *_public(api, openapi),
        Endpoint("GET", "/metrics", api.metrics, Scope.ADMIN, None),
        *([] if console is None else console.endpoints()),
    ]


def _chat(api: Handlers) -> list[Endpoint]:
    """What callers ask."""
    return [
        Endpoint(
            "POST",
            "/v1/chat/completions",
            api.chat_completions,
            Scope.CHAT,
            Operation(
                "createChatCompletion",
                "Answer a chat, whole or as server-sent events.",
                DocumentedAnswer(
                    "The completion, or its chunks as events.",
                    shapes.CHAT_COMPLETION,
                    as_events=True,
                ),
                body=ChatRequest,
                errors=(404, 502, 504),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/route",
            api.route,
            Scope.CHAT,
            Operation(
                "decide",
                "Decide only, and show every candidate's scores.",
                DocumentedAnswer("The decision.", shapes.DECISION),
                body=ChatRequest,
                errors=(404, 502, 504),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/feedback",
            api.feedback,
            Scope.FEEDBACK,
            Operation(
                "giveFeedback",
                "Give a score to one of your requests, once.",
                DocumentedAnswer("Kept.", shapes.FEEDBACK),
                body=FeedbackRequest,
                errors=(404, 409),
            ),
        ),
        Endpoint(
            "GET",
            "/v1/trajectories/{request_id}",
            api.trajectory,
            Scope.CHAT,
            Operation(
                "getTrajectory",
                "What happened in one of your requests: decisions, calls and checks as a tree.",
                DocumentedAnswer("The request, and its spans.", Trajectory),
                errors=(404,),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/trajectories/{request_id}/replay",
            api.replay,
            Scope.CHAT,
            Operation(
                "replayTrajectory",
                "Answer one of your requests again, with the choices that were made then.",
                DocumentedAnswer(
                    "The completion, or its chunks as events.",
                    shapes.CHAT_COMPLETION,
                    as_events=True,
                ),
                body=ChatRequest,
                errors=(404, 409, 502, 504),
            ),
        ),
        Endpoint(
            "GET",
            "/v1/usage",
            api.usage,
            Scope.CHAT,
            Operation(
                "getUsage",
                "What your key has used this hour, day, week and month, and its limits.",
                DocumentedAnswer("The periods.", KeyUsage),
            ),
        ),
        Endpoint(
            "GET",
            "/v1/models",
            api.models,
            Scope.CHAT,
            Operation(
                "listModels",
                "Everything a request may name as `model`.",
                DocumentedAnswer("The pool.", shapes.MODEL_LIST),
            ),
        ),
        Endpoint(
            "GET",
            "/v1/models/{model_id:path}",
            api.model,
            Scope.CHAT,
            Operation(
                "getModel",
                "One entry of the list of models.",
                DocumentedAnswer("The model or pair.", shapes.MODEL),
                errors=(404,),
            ),
        ),
    ]


def _models(pool: PoolAdmin) -> list[Endpoint]:
    """How admins see and change the pool's models."""
    return [
        Endpoint(
            "GET",
            "/v1/admin/models",
            pool.models,
            Scope.ADMIN,
            Operation(
                "adminListModels",
                "Models with state and settings.",
                DocumentedAnswer("The models.", shapes.ADMIN_LIST),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/admin/models",
            pool.add_model,
            Scope.ADMIN,
            Operation(
                "addModel",
                "Add a model; it gets requests when it is warm.",
                DocumentedAnswer("Accepted.", shapes.MODEL_CHANGE, 202),
                body=ModelSubmission,
                errors=(404, 409),
            ),
        ),
        Endpoint(
            "PUT",
            "/v1/admin/models/{model_id}",
            pool.update_model,
            Scope.ADMIN,
            Operation(
                "updateModel",
                "Change a model's settings; the new version takes over when it is warm.",
                DocumentedAnswer("Accepted.", shapes.MODEL_CHANGE, 202),
                body=ModelSubmission,
                errors=(404, 409),
            ),
        ),
        Endpoint(
            "PATCH",
            "/v1/admin/models/{model_id}",
            pool.set_price,
            Scope.ADMIN,
            Operation(
                "setPrice",
                "Change what a model's tokens cost.",
                DocumentedAnswer("Done.", shapes.MODEL_CHANGE),
                body=PriceConfig,
                errors=(404, 409),
            ),
        ),
        Endpoint(
            "DELETE",
            "/v1/admin/models/{model_id}",
            pool.remove_model,
            Scope.ADMIN,
            Operation(
                "removeModel",
                "Remove a model; requests that it works on end first.",
                DocumentedAnswer("Accepted.", shapes.MODEL_CHANGE, 202),
                errors=(400, 404),
            ),
        ),
    ]


def _tools(pool: PoolAdmin) -> list[Endpoint]:
    """How admins see and change the pool's tools."""
    return [
        Endpoint(
            "GET",
            "/v1/admin/tools",
            pool.tools,
            Scope.ADMIN,
            Operation(
                "adminListTools",
                "Tools with settings.",
                DocumentedAnswer("The tools.", shapes.ADMIN_LIST),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/admin/tools",
            pool.add_tool,
            Scope.ADMIN,
            Operation(
                "addTool",
                "Add a tool to some models, or to all.",
                DocumentedAnswer("Accepted.", shapes.TOOL_CHANGE, 202),
                body=ToolSubmission,
                errors=(404, 409),
            ),
        ),
        Endpoint(
            "DELETE",
            "/v1/admin/tools/{tool_id}",
            pool.remove_tool,
            Scope.ADMIN,
            Operation(
                "removeTool",
                "Remove a tool and its pairs.",
                DocumentedAnswer("Accepted.", shapes.TOOL_CHANGE, 202),
                errors=(400, 404),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/admin/tools/{tool_id}/accept",
            pool.accept_tool,
            Scope.ADMIN,
            Operation(
                "acceptTool",
                "Offer a function of an MCP server whose definition is new or changed.",
                DocumentedAnswer("Accepted.", shapes.TOOL_CHANGE, 202),
                body=ToolAcceptance,
                errors=(404, 409),
            ),
        ),
    ]


def _patterns(pool: PoolAdmin) -> list[Endpoint]:
    """How admins see and change the patterns."""
    return [
        Endpoint(
            "GET",
            "/v1/admin/patterns",
            pool.patterns,
            Scope.ADMIN,
            Operation(
                "adminListPatterns",
                "Patterns with their nodes, whether each answers now, and its worst case.",
                DocumentedAnswer("The patterns.", shapes.ADMIN_LIST),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/admin/patterns",
            pool.put_pattern,
            Scope.ADMIN,
            Operation(
                "putPattern",
                "Add a pattern, or give one other nodes.",
                DocumentedAnswer("Accepted.", shapes.PATTERN_CHANGE, 202),
                body=PatternConfig,
                errors=(404, 409),
            ),
        ),
        Endpoint(
            "DELETE",
            "/v1/admin/patterns/{name}",
            pool.remove_pattern,
            Scope.ADMIN,
            Operation(
                "removePattern",
                "Remove a pattern.",
                DocumentedAnswer("Accepted.", shapes.PATTERN_CHANGE, 202),
                errors=(400, 404),
            ),
        ),
    ]


def _rules(pool: PoolAdmin) -> list[Endpoint]:
    """How admins see and change the rules."""
    return [
        Endpoint(
            "GET",
            "/v1/admin/rules",
            pool.rules,
            Scope.ADMIN,
            Operation(
                "adminListRules",
                "The rules in their order, and what keeps one from deciding.",
                DocumentedAnswer("The rules.", shapes.ADMIN_LIST),
            ),
        ),
        Endpoint(
            "PUT",
            "/v1/admin/rules",
            pool.put_rules,
            Scope.ADMIN,
            Operation(
                "putRules",
                "Put other rules in place of all there are.",
                DocumentedAnswer("Accepted.", shapes.RULES_CHANGE, 202),
                body=RulesSubmission,
            ),
        ),
    ]


def _learning(api: Handlers) -> list[Endpoint]:
    """How admins see and drive the learning loop."""
    return [
        Endpoint(
            "GET",
            "/v1/admin/snapshots",
            api.admin_snapshots,
            Scope.ADMIN,
            Operation(
                "adminListSnapshots",
                "Router snapshots, and which of them served when.",
                DocumentedAnswer("The snapshots.", shapes.SNAPSHOT_LIST),
            ),
        ),
        Endpoint(
            "POST",
            "/v1/admin/jobs",
            api.submit_job,
            Scope.ADMIN,
            Operation(
                "submitJob",
                "Profile, fit, train, evaluate, promote or roll back, behind the response.",
                DocumentedAnswer("Accepted.", shapes.JOB, 201),
                body=JobSubmission,
            ),
        ),
        Endpoint(
            "GET",
            "/v1/admin/jobs",
            api.list_jobs,
            Scope.ADMIN,
            Operation(
                "listJobs",
                "The last jobs, the newest first.",
                DocumentedAnswer("The jobs.", shapes.JOB_LIST),
            ),
        ),
        Endpoint(
            "GET",
            "/v1/admin/jobs/{job_id}",
            api.get_job,
            Scope.ADMIN,
            Operation(
                "getJob",
                "One job with its progress, whole or as server-sent events.",
                DocumentedAnswer("The job, or its changes as events.", shapes.JOB, as_events=True),
                errors=(404,),
            ),
        ),
        Endpoint(
            "DELETE",
            "/v1/admin/jobs/{job_id}",
            api.cancel_job,
            Scope.ADMIN,
            Operation(
                "cancelJob",
                "End a job and free what it holds.",
                DocumentedAnswer("Cancelled.", shapes.JOB),
                errors=(404, 409),
            ),
        ),
    ]


def _public(api: Handlers, openapi: Handler) -> list[Endpoint]:
    """What asks for no key."""
    return [
        Endpoint(
            "GET",
            "/healthz",
            api.healthz,
            PUBLIC,
            Operation(
                "isAlive",
                "Whether this process answers.",
                DocumentedAnswer("The process answers.", shapes.STATUS),
            ),
            is_probe=True,
        ),
        Endpoint(
            "GET",
            "/readyz",
            api.readyz,
            PUBLIC,
            Operation(
                "isReady",
                "Whether a request can be served.",
                DocumentedAnswer("A request can be served.", shapes.STATUS),
                errors=(500,),
                also=(DocumentedAnswer("Nothing in the pool is ready.", shapes.STATUS, 503),),
            ),
            is_probe=True,
        ),
        Endpoint(
            "GET",
            "/openapi.json",
            openapi,
            PUBLIC,
            Operation(
                "getOpenApi",
                "This document.",
                DocumentedAnswer("The OpenAPI document.", shapes.DOCUMENT),
            ),
        ),
    ]
