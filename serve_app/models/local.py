"""Local models: Ray's own LLM server around vLLM, with two methods that take and give plain JSON.

Imported only where an engine runs or is deployed: it pulls in vLLM.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest
from vllm.exceptions import GenerationError
from vllm.platforms import current_platform

from serve_app.config import LocalModelConfig
from serve_app.errors import AtlasError, ConfigError, EngineError, InvalidRequest
from serve_app.models.boundary import guarded
from serve_app.models.forked import fork_engines
from serve_app.models.protocol import HEALTH_CHECK_PERIOD_S, ChatBody, refusal
from serve_app.models.session_router import session_routing
from serve_app.telemetry import log_files_kept

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""A model read from a folder needs no hub, and must not wait for one."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
"""One compiler for every schema, which refuses what it does not know. Left to itself, vLLM falls
back on others for rare keywords; one of them takes minutes and gigabytes for a hostile schema.

JSON is compact: between its parts a small model would write blanks until `max_tokens`."""

_COMPILERS_PLACE = re.compile(r"\[[0-9:]{8}\] /\S{1,200}:[0-9]{1,6}: ")
"""What xgrammar puts before its messages: the time, and a line of its source."""


class NothingToDownload(CallbackBase):  # type: ignore[misc]  # Ray is untyped
    """For weights in a folder.

    Without it, Ray starts a process that imports vLLM, downloads nothing, and stays.
    """

    async def on_before_node_init(self) -> None:
        """Leave the download out."""
        self.ctx.run_init_node = False


class OneProcessEngine(VLLMEngine):  # type: ignore[misc]  # Ray is untyped
    """`VLLMEngine` that keeps the executor `uni`: vLLM's engine and its worker in one process.

    Ray and vLLM make it `mp` on CPUs, because a worker of its own can be bound to cores and be
    given its threads. Where the environment says both, that process costs only memory and time.
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        is_one = self.llm_config.engine_kwargs.get("distributed_executor_backend") == "uni"
        if is_one and current_platform.is_cpu():
            fork_engines()
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if is_one:
            config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config


class EngineServer(LLMServer):  # type: ignore[misc]  # Ray is untyped
    """`LLMServer` that a new controller of Serve can take over."""

    _default_engine_cls = OneProcessEngine

    async def start(self) -> None:
        """Start the engine."""
        with log_files_kept():
            await super().start()

    async def _start_engine(self) -> None:
        """Start the engine alone: Ray would also start an actor that collects usage statistics.

        The graph reports none (`environment`), and the actor takes 250 MB.
        """
        if self.engine is None:
            raise ValueError("the server has no engine")
        await self.engine.start()


@guarded
class JsonLLMServer(EngineServer):
    """`LLMServer` for callers without vLLM: JSON bodies in place of request classes."""

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """Answer a request whole; see `ModelServer.complete`."""
        try:
            async for response in await self.chat(self._request(body, stream=False)):
                answer: dict[str, Any] = response.model_dump(mode="json", exclude_none=True)
                _raise_if_error(answer, body)
                return answer
        except GenerationError as error:
            raise _generation_failed(error.status_code, body) from error
        raise EngineError("the engine gave no answer")

    async def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request piece by piece; see `ModelServer.stream`."""
        async for batch in await self.chat(self._request(body, stream=True)):
            chunks = []
            for item in batch if isinstance(batch, list) else [batch]:
                if not isinstance(item, str):
                    _raise_if_error(item.model_dump(mode="json"), body)
                    continue
                for line in item.splitlines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        chunk = json.loads(line.removeprefix("data: "))
                        _raise_if_error(chunk, body)
                        chunks.append(chunk)
            if chunks:
                yield chunks

    def _request(self, body: ChatBody, *, stream: bool) -> ChatCompletionRequest:
        extra: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
        try:
            return ChatCompletionRequest(
                model=self._llm_config.model_id, stream=stream, **extra, **body
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(
                f"the engine refuses {where or 'the request'}: {first['msg']}", where
            ) from None


def _raise_if_error(answer: dict[str, Any], body: ChatBody) -> None:
    """Turn an engine's error object (Ray and vLLM each have a class) into one of ours.

    Args:
        answer: A completion, a chunk, or an error.
        body: The request.

    Raises:
        InvalidRequest: If the engine says that the request is at fault (4xx).
        EngineError: If it says that anything else went wrong.
    """
    error = answer.get("error")
    if not error:
        return
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 500:
        raise refusal(_COMPILERS_PLACE.sub("", str(error.get("message") or "")))
    raise _generation_failed(code, body)


def _generation_failed(code: Any, body: ChatBody) -> AtlasError:
    """What it means that the engine, alive, gave up one request with a status code.

    vLLM compiles a schema after it has taken the request, and then says no more than 500.
    """
    if code == HTTPStatus.INTERNAL_SERVER_ERROR:
        if (body.get("response_format") or {}).get("type") in ("json_schema", "json_object"):
            return InvalidRequest(
                "response_format: the engine cannot write an answer that fits this schema; "
                "simplify it",
                "response_format",
            )
        if body.get("tools") and body.get("tool_choice") not in (None, "auto", "none"):
            return InvalidRequest(
                "tools: the engine cannot write a call that fits the schema of the demanded tool; "
                "simplify it",
                "tools",
            )
    return EngineError("the engine failed")


def llm_config(config: LocalModelConfig) -> LLMConfig:
    """Ray's settings for a local model; the place where our names meet Ray's and vLLM's.

    Raises:
        ConfigError: If an environment variable that names a revision holds no commit.
    """
    ranks = int(config.engine_kwargs.get("tensor_parallel_size", 1)) * int(
        config.engine_kwargs.get("pipeline_parallel_size", 1)
    )
    from_folder = config.model_source.startswith("/")
    return LLMConfig(
        model_loading_config={"model_id": config.model_id, "model_source": config.model_source},
        engine_kwargs={"structured_outputs_config": _GRAMMARS} | _with_revisions(config),
        accelerator_type=config.accelerator_type,
        placement_group_config={"bundles": [dict(config.bundle)] * ranks},
        runtime_env={"env_vars": {**(_OFFLINE if from_folder else {}), **config.env}},
        deployment_config={
            "autoscaling_config": config.autoscaling.model_dump(),
            "max_ongoing_requests": config.max_ongoing_requests,
            "ray_actor_options": {"num_cpus": config.num_cpus},
            "max_constructor_retry_count": 1,
            "health_check_period_s": HEALTH_CHECK_PERIOD_S,
            "request_router_config": session_routing(),
        },
        callback_config={"callback_class": NothingToDownload} if from_folder else {},
        experimental_configs={"stream_batching_interval_ms": 0},
        log_engine_metrics=False,
    )


def _with_revisions(config: LocalModelConfig) -> dict[str, Any]:
    """The engine's arguments, with each revision that stands in the environment filled in."""
    filled = dict(config.engine_kwargs)
    for name in ("revision", "code_revision"):
        variable = _VARIABLE.fullmatch(str(filled.get(name, "")))
        if variable is None:
            continue
        filled[name] = os.environ.get(variable[1], "")
        if not _COMMIT.fullmatch(filled[name]):
            raise ConfigError(
                f"environment variable {variable[1]!r} has to hold the commit (40 hexadecimal "
                f"digits) of {config.model_source!r} that is to be run"
            )
    return filled


def build_local(config: LocalModelConfig, deployment_name: str) -> Application:
    """The Serve application of a local model."""
    options = {"override_serve_options": {"name": deployment_name}}
    if config.role == "verifier":
        from serve_app.models.process_reward import ProcessRewardServer

        return build_llm_deployment(
            llm_config(config),
            deployment_cls=ProcessRewardServer,
            bind_kwargs={"scoring": config.scoring},
            **options,
        )
    return build_llm_deployment(llm_config(config), deployment_cls=JsonLLMServer, **options)
