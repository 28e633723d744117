"""`plan`: a lead splits the task, workers do the parts, and the parts are put together."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.budget import Budget, Caps
from serve_app.config.patterns.check import WORD_BYTES
from serve_app.config.patterns.language import AskNode, PlanNode
from serve_app.config.patterns.template import Reference, Template, cut
from serve_app.errors import EngineError
from serve_app.orchestrator.patterns.chain import run_node
from serve_app.orchestrator.patterns.nodes.ask import read_json
from serve_app.orchestrator.patterns.nodes.parallel import together
from serve_app.orchestrator.patterns.view import NodeView, Result, Status, end, failed, is_cap

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "subtasks": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "pattern": "^[a-z][a-z0-9_]{0,15}$"},
                    "ask": {"type": "string", "minLength": 1, "maxLength": 4000},
                },
                "required": ["id", "ask"],
            },
        }
    },
    "required": ["subtasks"],
}
"""What a lead answers with."""


@dataclass(frozen=True)
class Subtask:
    """One part of a plan."""

    id: str
    ask: Template
    needs: frozenset[str]
    """Ids of the parts whose answers it asks with."""


async def run(node: PlanNode, view: NodeView) -> Result:
    """Split, work, join.

    A lead that gives no plan is told so and asked once more; then the task is done as one part, if
    it is no longer than a part may be. A part whose
    question, filled in, is that of an earlier part takes the earlier answer: nothing is asked
    twice.

    Returns:
        The joined answer; partial where some parts have none.

    Raises:
        AtlasError: If no part has an answer.
    """
    inner = replace(view, streams=False)
    subtasks, lead = await _split(node, inner)
    if subtasks is None:
        return lead
    view.span.attributes["subtasks"] = len(subtasks)
    done = await _worked(node, subtasks, inner)
    needed = {name for subtask in subtasks for name in subtask.needs}
    is_join = isinstance(node.join, AskNode)
    wanted = [s.id for s in subtasks if is_join or s.id not in needed]
    parts = [done[name] for name in wanted]
    good = [result for result in parts if result.is_usable and result.text]
    failures = [result.failure for result in parts if result.failure is not None]
    if not good:
        refused = next((result for result in parts if result.status is Status.REFUSED), None)
        if refused is not None and not failures:
            return refused
        return failed(failures[0] if failures else EngineError("no part of the plan has an answer"))
    whole = len(good) == len(parts) and all(result.status is Status.OK for result in good)
    if isinstance(node.join, AskNode):
        named = [
            replace(done[name], text=f"{name}: {done[name].shown}", choices=())
            for name in wanted
            if done[name].is_usable
        ]
        joined = await run_node(node.join, view.seeing(answers=together(named)))
        if joined.status is Status.FAILED and is_cap(joined.failure) and not joined.is_sent:
            joined = replace(
                together(good), status=Status.PARTIAL, failure=joined.failure, data=None
            )
    else:
        joined = good[0] if len(parts) == 1 else replace(together(good), data=None)
    if whole or joined.status is not Status.OK:
        return joined
    failure = next(iter(failures), None) or EngineError("a part of the plan has no answer")
    return replace(joined, status=Status.PARTIAL, failure=failure)


async def _split(node: PlanNode, view: NodeView) -> tuple[list[Subtask] | None, Result]:
    """The parts; `None`: the lead refused or was cut short, and its result is the plan's."""
    lead = Result()
    fault: str | None = None
    for _ in range(2):
        repairs = None if fault is None else (lead, fault)
        lead = await run_node(node.lead, view, repairs=repairs)
        if lead.status is Status.REFUSED or is_cap(lead.failure):
            return None, lead
        if lead.status is Status.FAILED:
            fault = lead.failure.message if lead.failure else "it failed"
            break
        subtasks, fault = read_plan(lead.text, node.max_subtasks)
        if subtasks is not None:
            return subtasks, lead
    view.span.attributes["fault"] = (fault or "")[:200]
    if len(view.question.encode("utf-8", "replace")) > WORD_BYTES:
        return None, failed(EngineError(f"the lead gives no plan: {fault}"))
    whole = Template((view.question,))
    return [Subtask("a", whole, frozenset())], lead


def read_plan(text: str, max_subtasks: int) -> tuple[list[Subtask] | None, str | None]:
    """The parts of a plan, and what is wrong with it.

    Args:
        text: The lead's answer.
        max_subtasks: The most that are allowed.
    """
    data, fault = read_json(text, SCHEMA)
    if fault is not None:
        return None, fault
    subtasks: list[Subtask] = []
    known: set[str] = set()
    if len(data["subtasks"]) > max_subtasks:
        return None, f"there are more than {max_subtasks} subtasks"
    for part in data["subtasks"]:
        if part["id"] in known:
            return None, f"the id {part['id']!r} is there twice"
        try:
            ask = Template.parse(part["ask"])
        except ValueError as error:
            return None, str(error)
        needs = frozenset(reference.name for reference in ask.references)
        if not needs <= known:
            return None, f"{part['id']!r} refers to what comes later, or not at all"
        known.add(part["id"])
        subtasks.append(Subtask(part["id"], ask, needs))
    return subtasks, None


async def _worked(
    node: PlanNode, subtasks: Sequence[Subtask], view: NodeView
) -> Mapping[str, Result]:
    """What each part came to; each begins as soon as what it needs is there."""
    budget = _kept_back(node, view.budget)
    view = replace(view, budget=budget)
    asked: dict[str, asyncio.Task[Result]] = {}
    tasks: dict[str, asyncio.Task[Result]] = {}

    async def work(subtask: Subtask) -> Result:
        results = {name: await asyncio.shield(tasks[name]) for name in sorted(subtask.needs)}
        for result in results.values():
            if not result.is_usable:
                return replace(result, text="")

        def value(reference: Reference) -> str:
            return results[reference.name].shown.strip()

        question = cut(subtask.ask.fill(value), WORD_BYTES)
        if question not in asked:
            seen = view.seeing(subtask=Result(text=question, max_bytes=WORD_BYTES))
            asked[question] = asyncio.ensure_future(run_node(node.worker, seen))
        return await asyncio.shield(asked[question])

    try:
        for subtask in subtasks:
            tasks[subtask.id] = asyncio.ensure_future(work(subtask))
        await asyncio.gather(*tasks.values())
        return {name: task.result() for name, task in tasks.items()}
    finally:
        await end(*tasks.values(), *asked.values())


def _kept_back(node: PlanNode, budget: Budget) -> Budget:
    """The budget of the workers: less a share for the last answer, where one is asked for."""
    if not isinstance(node.join, AskNode) or node.reserve == 0:
        return budget
    share = 1 - node.reserve
    left = budget.left
    calls, tool_calls = (
        value if value == math.inf else max(min(value, 1.0), float(int(value * share)))
        for value in (left.model_calls, left.tool_calls)
    )
    caps = Caps(left.usd * share, left.tokens * share, calls, tool_calls)
    return budget.child(budget.deadline.sooner(share * max(budget.seconds_left, 0.0)), caps)
