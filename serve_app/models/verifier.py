"""Verifiers: models that read a question and its answer, and say how good the answer is.

They speak the protocol of every model (`models.protocol`), so they are deployed, watched and
replaced like any other: in goes a conversation that ends with the answer, out comes a completion
whose text is the score. A remote reward model that answers so will do as well.
"""

from __future__ import annotations

import math
from typing import Any

from serve_app.errors import EngineError
from serve_app.models.protocol import ChatBody
from serve_app.models.reply import ModelReply

_END_OF_THOUGHT = "</think>"


def scoring_body(question: str, answer: str) -> ChatBody:
    """The request that has an answer rated.

    Args:
        question: What was asked.
        answer: A model's text; what it thought before its answer is left out.
    """
    said = answer.rpartition(_END_OF_THOUGHT)[2]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": said.strip()},
        ]
    }


def score_completion(score: float, prompt_tokens: int) -> dict[str, Any]:
    """What a verifier answers.

    Args:
        score: In [0, 1].
        prompt_tokens: Tokens it read.

    Returns:
        An OpenAI `chat.completion` object.
    """
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": f"{score:.6g}"},
        "finish_reason": "stop",
    }
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 0,
        "total_tokens": prompt_tokens,
    }
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


def read_score(reply: ModelReply) -> float:
    """The score in a verifier's answer.

    Raises:
        EngineError: If there is no finite number in it.
    """
    try:
        score = float(reply.choices[0].text or "")
    except ValueError:
        raise EngineError("the verifier gave no score") from None
    if not math.isfinite(score):
        raise EngineError("the verifier's score is no number")
    return score
