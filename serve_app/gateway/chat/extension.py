"""What responses say beyond OpenAI's shape: the `atlas` object, and the lists of models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from serve_app.schemas import Candidate, Decision, Report, Step, Usage

Json = dict[str, Any]


def completion_extension(report: Report, *, alpha: float, explain: bool) -> Json:
    """The `atlas` object of a completion.

    Args:
        report: The finished request.
        alpha: The cost-quality dial it ran with.
        explain: Whether to list every candidate.
    """
    decision = report.decision
    extension: Json = {
        "request_id": report.request_id,
        "pair": str(report.pair),
        "path": str(report.final_step.path if report.final_step else decision.path),
        "confidence": decision.confidence,
        "propensity": decision.propensity,
        "alpha": alpha,
        "steps": [_step(step) for step in report.steps],
        "answer_step": report.answer_step,
        "stop": str(report.stop),
        "usage": usage(report.usage),
        "seconds": report.seconds,
        "cost_usd": report.usage.cost_usd,
        "policy_version": decision.policy_version,
        "pool_version": decision.pool_version,
    }
    if report.is_partial:
        extension |= {"partial": True, "stopped_by": str(report.stop)}
    if report.sources:
        extension["sources"] = [_source(source) for source in report.sources]
    if explain:
        extension["decision"] = decision_object(decision)
        chances = report.decisions[-1].chances if report.decisions else ()
        if chances:
            extension["chances"] = list(chances)
    return extension


def _source(source: Json) -> Json:
    """A source as a caller sees it."""
    return {name: source[name] for name in ("id", "title", "text") if name in source}


def decision_object(decision: Decision) -> Json:
    """A decision with every candidate's scores, best first."""
    like = decision.likeness
    return {
        "action": str(decision.action),
        "pair": str(decision.pair),
        "path": str(decision.path),
        "confidence": decision.confidence,
        "propensity": decision.propensity,
        "look": decision.look,
        "distance_quantile": decision.distance_quantile,
        "cluster": None if like is None else {"index": like.cluster, "examples": like.examples},
        "candidates": [_candidate(candidate) for candidate in decision.candidates],
        "hops": [asdict(hop) for hop in decision.hops],
        "policy_version": decision.policy_version,
        "pool_version": decision.pool_version,
        "seconds": decision.seconds,
    }


def usage(used: Usage) -> Json:
    """Tokens, as OpenAI counts them."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }


def _candidate(candidate: Candidate) -> Json:
    return {
        "pair": str(candidate.pair),
        "utility": candidate.utility,
        "quality": candidate.quality,
        "quality_low": candidate.low,
        "quality_high": candidate.high,
        "cost": candidate.cost,
        "cost_usd": candidate.cost_usd,
    }


def _step(step: Step) -> Json:
    return {
        "action": str(step.action),
        "pair": str(step.pair),
        "path": str(step.path),
        "propensity": step.propensity,
        "policy_version": step.policy_version,
        "seconds": step.seconds,
        "usage": usage(step.usage),
        "cost_usd": step.usage.cost_usd,
        "error": step.error,
        "mean_logprob": step.mean_logprob,
        "tool_calls": [
            {
                "tool_id": call.tool_id,
                "function": call.function,
                "arguments": call.arguments,
                "ok": call.ok,
                "seconds": call.seconds,
                "sources": call.data.get("sources", []),
            }
            for call in step.tool_calls
        ],
    }
