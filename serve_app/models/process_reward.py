"""Process reward models on vLLM: each step of an answer is judged, the answer is their product.

Ray's own LLM server runs the engine; the scores come from vLLM's pooling API, which Ray's server
has as an ASGI app. Imported only where an engine runs or is deployed: it pulls in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
from ray.serve.llm import LLMConfig

from serve_app.config import ScoringConfig
from serve_app.errors import EngineError
from serve_app.models.boundary import guarded
from serve_app.models.local import EngineServer
from serve_app.models.protocol import ChatBody, refusal
from serve_app.models.verifier import score_completion

# In this process: there is no network between the client and the app.
_ADDRESS = "http://engine"


@guarded
class ProcessRewardServer(EngineServer):
    """`LLMServer` that answers a conversation with the score of its last message."""

    async def __init__(self, llm_config: LLMConfig, scoring: ScoringConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the engine.

        Args:
            llm_config: Ray's settings, with vLLM's `runner: pooling`.
            scoring: How the model reads an answer.
        """
        await super().__init__(llm_config)
        self._scoring = scoring
        app = await self.engine.build_asgi_app()
        self._pooling = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url=_ADDRESS, timeout=None
        )

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """Rate the last message; see `ModelServer.complete`.

        Raises:
            InvalidRequest: If the conversation does not fit.
            EngineError: If the engine fails.
        """
        request = {
            "model": self._llm_config.model_id,
            "messages": judged(body["messages"], self._scoring),
            "task": "token_classify",
        }
        response = await self._pooling.post("/pooling", json=request)
        answer = response.json()
        if response.status_code >= 500:
            raise EngineError("the engine failed")
        if response.status_code >= 400:
            raise refusal(str((answer.get("error") or {}).get("message") or ""))
        labels = [step[self._scoring.positive_label] for step in answer["data"][0]["data"]]
        return score_completion(
            combined(labels, self._scoring), answer["usage"].get("prompt_tokens") or 0
        )

    async def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """Rate the last message; see `ModelServer.stream`."""
        completion = await self.complete(body)
        (choice,) = completion["choices"]
        delta = {"index": 0, "delta": choice["message"], "finish_reason": "stop"}
        head = {"object": "chat.completion.chunk"}
        yield [
            head | {"choices": [delta]},
            head | {"choices": [], "usage": completion["usage"]},
        ]


def judged(messages: Sequence[dict[str, Any]], scoring: ScoringConfig) -> list[dict[str, Any]]:
    """The conversation as the model was trained on it, a step token behind each step.

    Args:
        messages: OpenAI messages. The last one is rated where it is the assistant's; an empty
            answer is, otherwise.
        scoring: The model's ways.

    Returns:
        A system message, the question and the answer.
    """
    said = messages[-1]["content"] or "" if messages[-1]["role"] == "assistant" else ""
    asked = next((m["content"] or "" for m in reversed(messages) if m["role"] == "user"), "")
    # A step token in the text would be a step of its own.
    asked, said = (without_token(text, scoring.step_token) for text in (asked, said))
    steps = [step.strip() for step in said.split(scoring.step_separator) if step.strip()]
    return [
        {"role": "system", "content": scoring.system},
        {"role": "user", "content": asked},
        {
            "role": "assistant",
            "content": "".join(step + scoring.step_token for step in steps or [""]),
        },
    ]


def without_token(text: str, token: str) -> str:
    """A text in which a token is nowhere, not even one that is left when others are taken out."""
    if token not in text:
        return text
    kept: list[str] = []
    for char in text:
        kept.append(char)
        if char == token[-1] and "".join(kept[-len(token) :]) == token:
            del kept[-len(token) :]
    return "".join(kept)


def combined(step_scores: Sequence[float], scoring: ScoringConfig) -> float:
    """From the steps' scores to the answer's.

    Args:
        step_scores: Probability of each step to be right, in [0, 1].
        scoring: `product` is what both sources of these models rank answers by (arXiv 2305.20050,
            2501.07301).

    Raises:
        EngineError: If there are no scores, because the model's step token is another one.
    """
    if not step_scores:
        raise EngineError("the reward model judged no step; is its step token configured?")
    match scoring.combine:
        case "product":
            return math.prod(step_scores)
        case "min":
            return min(step_scores)
        case "last":
            return step_scores[-1]
