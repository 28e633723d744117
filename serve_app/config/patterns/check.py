"""What a pattern must be beyond its single nodes: names that exist, no cycle, one text at a time.

The pool's names come and go after a pattern was read: `unmet` says which are missing now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve_app.config.patterns.language import (
    MAX_NODES,
    ROUTE,
    AskNode,
    BranchNode,
    CascadeNode,
    CritiqueNode,
    NodeBase,
    ParallelNode,
    PatternConfig,
    PlanNode,
    Predicate,
    RefuseNode,
    RetrieveNode,
    ToolNode,
    VerifyNode,
    VoteNode,
)
from serve_app.config.patterns.template import Reference, references_in
from serve_app.config.tools import ToolsetConfig
from serve_app.errors import ConfigError
from serve_app.schemas import NO_TOOL, PATTERN_PREFIX, Pair, PatternMember

if TYPE_CHECKING:
    from serve_app.config import AtlasConfig

MAX_DEPTH = 4
"""Nodes inside nodes, those of patterns that are asked included."""
MAX_PROMPT_BYTES = 65_536
"""Of a filled template, the question left out."""
QUESTION = "question"
"""The last user message."""

_PATHS = ("count", "status", "data")


@dataclass
class PatternNeeds:
    """What a pattern names of the pool."""

    pairs: set[Pair] = field(default_factory=set)
    verifiers: set[str] = field(default_factory=set)
    tools: set[str] = field(default_factory=set)
    patterns: set[str] = field(default_factory=set)
    routes: list[AskNode] = field(default_factory=list)
    """Nodes that leave the choice to the router."""


def children(node: NodeBase) -> Sequence[NodeBase]:
    """The nodes directly inside a node."""
    match node:
        case BranchNode():
            return [inner for case in node.cases for inner in case.do] + list(node.otherwise)
        case ParallelNode():
            return [*node.do, *([node.join] if isinstance(node.join, AskNode) else [])]
        case VoteNode() | CascadeNode():
            return node.of
        case CritiqueNode():
            return [node.draft, *node.critics, node.revise]
        case PlanNode():
            joins = [node.join] if isinstance(node.join, AskNode) else []
            return [node.lead, node.worker, *joins]
    return []


def walk(nodes: Iterable[NodeBase]) -> Iterator[NodeBase]:
    """All nodes, those inside others after them."""
    for node in nodes:
        yield node
        yield from walk(children(node))


def needs_of(pattern: PatternConfig) -> PatternNeeds:
    """What a pattern names, patterns that it asks not followed."""
    needs = PatternNeeds()
    for node in walk(pattern.do):
        match node:
            case AskNode(pair=str(pair)) if pair.startswith(PATTERN_PREFIX):
                needs.patterns.add(pair.removeprefix(PATTERN_PREFIX))
            case AskNode(pair=str(pair)) if pair == ROUTE:
                needs.routes.append(node)
            case AskNode():
                needs.pairs.add(Pair.parse(node.pair))
            case ToolNode():
                needs.tools.add(node.tool)
            case RetrieveNode():
                needs.tools.add(node.corpus)
            case VerifyNode():
                needs.tools |= {node.tool} if node.tool else set()
                needs.verifiers |= {node.verifier} if node.verifier else set()
            case CascadeNode():
                needs.verifiers |= {node.accept.verifier} if node.accept.verifier else set()
                needs.tools |= {node.accept.examples} if node.accept.examples else set()
    return needs


def functions_of(pattern: PatternConfig) -> set[str]:
    """Python functions that a pattern calls."""
    nodes = walk(pattern.do)
    return {node.function for node in nodes if isinstance(node, ParallelNode) and node.function}


def tail_asks(pattern: PatternConfig) -> list[AskNode]:
    """The nodes of which one is the last thing done: its text can be streamed."""
    last = pattern.do[-1]
    if pattern.answer is not None and pattern.answer != last.id:
        return []
    return [ask for ask in _tails(last) if ask.stream is not False and ask.output is None]


def _tails(node: NodeBase) -> list[AskNode]:
    match node:
        case AskNode():
            return [node]
        case BranchNode():
            ways = [case.do for case in node.cases] + [node.otherwise]
            return [ask for way in ways if way for ask in _tails(way[-1])]
        case ParallelNode(join=AskNode() as join) | PlanNode(join=AskNode() as join):
            return _tails(join)
        case CascadeNode():
            return _tails(node.of[-1])
    return []


def check_patterns(config: AtlasConfig) -> None:
    """Check all patterns of a deployment.

    Raises:
        ConfigError: If one cannot run; the message names the pattern and the node.
    """
    patterns: dict[str, PatternConfig] = {}
    for pattern in config.patterns:
        if pattern.name in patterns:
            raise ConfigError(f"pattern {pattern.name!r} is there more than once")
        patterns[pattern.name] = pattern
    for pattern in config.patterns:
        check_pattern(pattern, patterns, config)


def check_pattern(
    pattern: PatternConfig, patterns: Mapping[str, PatternConfig], config: AtlasConfig
) -> None:
    """Check one pattern, and those that ask it.

    Args:
        pattern: The pattern.
        patterns: All of the deployment, by name; of this name, the one that is checked.
        config: The deployment.

    Raises:
        ConfigError: If it cannot run; the message names the node.
    """
    patterns = {**patterns, pattern.name: pattern}
    way = _cycle(pattern.name, patterns, ())
    if way:
        raise ConfigError(f"pattern {pattern.name!r} asks itself: {way}")
    missing = unmet(pattern, patterns, config)
    if missing:
        raise ConfigError(f"pattern {pattern.name!r}: {missing[0]}")
    asking = [
        of
        for of in patterns.values()
        if of.name != pattern.name
        and not unmet(of, patterns, config)
        and pattern in _asked(of.name, patterns)
    ]
    for of in (pattern, *asking):
        if depth_of(of, patterns) > MAX_DEPTH:
            raise ConfigError(f"pattern {of.name!r}: nodes are nested more than {MAX_DEPTH} deep")
        _Checker(of, patterns).check()


def unmet(
    pattern: PatternConfig, patterns: Mapping[str, PatternConfig], config: AtlasConfig
) -> list[str]:
    """What a pattern names that the pool does not have; empty: all of it is there.

    Patterns that it asks are followed.
    """
    way = _cycle(pattern.name, patterns, ())
    if way:
        return [f"it asks itself: {way}"]
    seen: set[str] = set()
    missing: list[str] = []
    _collect_unmet(pattern, patterns, config, seen, missing)
    return missing


def _collect_unmet(
    pattern: PatternConfig,
    patterns: Mapping[str, PatternConfig],
    config: AtlasConfig,
    seen: set[str],
    missing: list[str],
) -> None:
    seen.add(pattern.name)
    pairs, roles = set(config.all_pairs()), {m.model_id: m.role for m in config.models}
    tools = {tool.tool_id: tool for tool in config.tools}
    needs = needs_of(pattern)
    for pair in sorted(needs.pairs):
        plain = pair.tool_id == NO_TOOL and roles.get(pair.model_id) == "chat"
        if pair not in pairs and not plain:
            missing.append(f"there is no pair {str(pair)!r} in the pool")
    for name in sorted(needs.verifiers):
        if roles.get(name) != "verifier":
            missing.append(f"{name!r} is no model with the role 'verifier'")
    for name in sorted(needs.tools):
        if name not in tools:
            missing.append(f"there is no tool {name!r} in the pool")
    for node in walk(pattern.do):
        wanted = (
            ("retrieval", node.corpus)
            if isinstance(node, RetrieveNode)
            else ("debug", node.tool)
            if isinstance(node, VerifyNode)
            else ("debug", node.accept.examples)
            if isinstance(node, CascadeNode)
            else ("", None)
        )
        if wanted[1] in tools and tools[wanted[1]].type != wanted[0]:
            missing.append(f"the tool {wanted[1]!r} is no {wanted[0]} tool")
        if isinstance(node, ToolNode) and isinstance(tools.get(node.tool), ToolsetConfig):
            missing.append(f"the tool {node.tool!r} is a toolset; name one of its members")
    for node in needs.routes:
        if not routed_pairs(node, config):
            missing.append("'route' allows no pair of the pool")
    for name in sorted(needs.patterns):
        if name not in patterns:
            missing.append(f"there is no pattern {name!r}")
        elif name not in seen:
            _collect_unmet(patterns[name], patterns, config, seen, missing)


def member_of(
    pattern: PatternConfig, patterns: Mapping[str, PatternConfig], config: AtlasConfig
) -> PatternMember:
    """What a pattern needs of the pool, patterns that it asks included."""
    missing = unmet(pattern, patterns, config)
    pairs: set[Pair] = set()
    models: set[str] = set()
    choices: list[frozenset[Pair]] = []
    for part in () if missing else _asked(pattern.name, patterns):
        needs = needs_of(part)
        pairs |= needs.pairs
        models |= needs.verifiers
        choices += [frozenset(routed_pairs(node, config)) for node in needs.routes]
    return PatternMember(
        pattern.name,
        frozenset(pairs),
        frozenset(models),
        tuple(dict.fromkeys(choices)),
        pattern.routable,
        missing[0] if missing else None,
    )


def members_of_patterns(config: AtlasConfig) -> tuple[PatternMember, ...]:
    """What each pattern of a deployment needs of the pool."""
    patterns = {pattern.name: pattern for pattern in config.patterns}
    return tuple(member_of(pattern, patterns, config) for pattern in config.patterns)


def routed_pairs(node: AskNode, config: AtlasConfig) -> list[Pair]:
    """Pairs of the pool among which a node lets the router choose."""
    models, tools = node.route.models, node.route.tools
    return [
        pair
        for pair in config.all_pairs()
        if (models is None or pair.model_id in models) and (tools is None or pair.tool_id in tools)
    ]


def depth_of(pattern: PatternConfig, patterns: Mapping[str, PatternConfig]) -> int:
    """How deep nodes are nested, patterns that are asked included."""

    def of(node: NodeBase) -> int:
        inner = [of(child) for child in children(node)]
        if isinstance(node, AskNode) and node.pair.startswith(PATTERN_PREFIX):
            inner.append(depth_of(patterns[node.pair.removeprefix(PATTERN_PREFIX)], patterns))
        return 1 + max(inner, default=0)

    return max(of(node) for node in pattern.do)


def _cycle(name: str, patterns: Mapping[str, PatternConfig], above: tuple[str, ...]) -> str | None:
    """The way on which a pattern, or one that it asks, asks itself; `None`: there is none."""
    if name in above:
        return " -> ".join((*above[above.index(name) :], name))
    if name not in patterns:
        return None
    ways = (_cycle(inner, patterns, (*above, name)) for inner in sorted(_names_in(patterns[name])))
    return next((way for way in ways if way), None)


def _names_in(pattern: PatternConfig) -> set[str]:
    return needs_of(pattern).patterns


class _Checker:
    """Walks one pattern with what each node can see."""

    def __init__(self, pattern: PatternConfig, patterns: Mapping[str, PatternConfig]) -> None:
        self._pattern = pattern
        self._patterns = patterns
        self._ids: set[str] = set()
        self._tails = [id(ask) for ask in tail_asks(pattern)]

    def check(self) -> None:
        """Check everything.

        Raises:
            ConfigError: If something is wrong.
        """
        count = sum(1 for _ in walk(self._pattern.do))
        if count > MAX_NODES:
            raise ConfigError(
                f"pattern {self._pattern.name!r}: at most {MAX_NODES} nodes, got {count}"
            )
        top = [node.id for node in self._pattern.do]
        if self._pattern.answer is not None and self._pattern.answer not in top:
            raise ConfigError(
                f"pattern {self._pattern.name!r}: answer: there is no node "
                f"{self._pattern.answer!r} directly under 'do'"
            )
        self._chain(self._pattern.do, {QUESTION: None}, "do")

    def _fail(self, where: str, what: str) -> ConfigError:
        return ConfigError(f"pattern {self._pattern.name!r}, node {where}: {what}")

    def _chain(
        self, nodes: Sequence[NodeBase], seen: dict[str, NodeBase | None], where: str
    ) -> None:
        seen = dict(seen)
        for number, node in enumerate(nodes):
            self._node(node, seen, f"{where}[{number}]")
            if node.id is not None:
                seen[node.id] = node

    def _node(self, node: NodeBase, seen: dict[str, NodeBase | None], where: str) -> None:
        where = node.id or f"{where}.{node.kind}"
        if node.id is not None:
            if node.id in self._ids or node.id == QUESTION:
                raise self._fail(where, f"the id {node.id!r} is taken")
            self._ids.add(node.id)
        self._own_references(node, seen, where)
        match node:
            case AskNode():
                self._ask(node, seen, where)
            case BranchNode():
                for number, case in enumerate(node.cases):
                    self._predicate(case.when, seen, where)
                    self._chain(case.do, seen, f"{where}.cases[{number}]")
                self._chain(node.otherwise, seen, f"{where}.else")
            case ParallelNode():
                inner = seen if node.each is None else {**seen, "item": None}
                for number, branch in enumerate(node.do):
                    self._node(branch, inner, f"{where}.do[{number}]")
                if isinstance(node.join, AskNode):
                    self._node(node.join, {**seen, "answers": None}, f"{where}.join")
            case VoteNode() | CascadeNode():
                for number, ask in enumerate(node.of):
                    self._node(ask, seen, f"{where}.of[{number}]")
            case CritiqueNode():
                self._critique(node, seen, where)
            case PlanNode():
                self._node(node.lead, seen, f"{where}.lead")
                self._node(node.worker, {**seen, "subtask": None}, f"{where}.worker")
                if isinstance(node.join, AskNode):
                    self._node(node.join, {**seen, "answers": None}, f"{where}.join")

    def _own_references(
        self, node: NodeBase, seen: Mapping[str, NodeBase | None], where: str
    ) -> None:
        match node:
            case ToolNode():
                self._references(references_in(node.arguments), seen, where)
            case RetrieveNode():
                self._references(references_in(node.query), seen, where)
            case VerifyNode():
                for name in filter(None, (node.of, node.sources)):
                    self._result(name, seen, where)
                self._references(references_in(node.say), seen, where)
            case RefuseNode():
                if node.when is not None:
                    self._predicate(node.when, seen, where)
                self._references(references_in(node.say), seen, where)

    def _critique(self, node: CritiqueNode, seen: dict[str, NodeBase | None], where: str) -> None:
        self._node(node.draft, seen, f"{where}.draft")
        drafted = {**seen, "draft": node.draft}
        for number, critic in enumerate(node.critics):
            if isinstance(critic, VerifyNode) and critic.of != "draft":
                raise self._fail(where, "a critic that verifies has 'of: draft'")
            self._node(critic, drafted, f"{where}.critics[{number}]")
        self._node(node.revise, {**drafted, "objections": None}, f"{where}.revise")

    def _ask(self, node: AskNode, seen: dict[str, NodeBase | None], where: str) -> None:
        if node.stream and id(node) not in self._tails:
            raise self._fail(
                where, "stream: only the last thing a pattern does can stream its text"
            )
        for name in (*node.uses, *((node.cite,) if node.cite else ())):
            self._result(name, seen, where)
        templates = [text for text in (node.prompt, node.system) if text is not None]
        self._references(references_in(templates), seen, where)
        size = sum(len(text.encode()) for text in templates)
        size += sum(self._size(ref.name, seen) for ref in references_in(templates))
        size += sum(self._size(name, seen) for name in node.uses)
        if size > MAX_PROMPT_BYTES:
            raise self._fail(
                where,
                f"the prompt may grow to {size} bytes, and {MAX_PROMPT_BYTES} are allowed; lower "
                "'max_bytes' of what it uses",
            )
        if not node.pair.startswith(PATTERN_PREFIX) or not self._pattern.routable:
            return
        pattern = node.pair.removeprefix(PATTERN_PREFIX)
        if any(needs_of(of).routes for of in _asked(pattern, self._patterns)):
            raise self._fail(
                where,
                f"the pattern {pattern!r} asks the router; a pattern that the router may choose "
                "cannot ask it through another ('routable: false' allows it)",
            )

    def _size(self, name: str, seen: Mapping[str, NodeBase | None]) -> int:
        if name == QUESTION:
            return 0
        return max_bytes_of(seen.get(name))

    def _predicate(self, when: Predicate, seen: Mapping[str, NodeBase | None], where: str) -> None:
        self._references(map(Reference.parse, when), seen, where)

    def _references(
        self, references: Iterable[Reference], seen: Mapping[str, NodeBase | None], where: str
    ) -> None:
        for reference in references:
            node = self._name(reference.name, seen, where)
            head, *keys = reference.path or ("",)
            if head and (head not in _PATHS or (keys and head != "data")):
                raise self._fail(where, f"{reference}: a result has text, count, status and data")
            if head and node is None:
                raise self._fail(where, f"{reference}: {reference.name!r} is a text")
            if head == "data" and isinstance(node, AskNode):
                if node.output is None:
                    raise self._fail(where, f"{reference}: {node.id!r} has no 'output'")
                if keys and keys[0] not in node.output["properties"]:
                    raise self._fail(where, f"{reference}: 'output' has no {keys[0]!r}")

    def _result(self, name: str, seen: Mapping[str, NodeBase | None], where: str) -> None:
        if name == QUESTION:
            raise self._fail(where, f"{QUESTION!r} is no result; name a node before it")
        self._name(name, seen, where)

    def _name(self, name: str, seen: Mapping[str, NodeBase | None], where: str) -> NodeBase | None:
        if name not in seen:
            there = ", ".join(sorted(seen))
            raise self._fail(where, f"there is no {name!r} before it; there is {there}")
        return seen[name]


def _asked(name: str, patterns: Mapping[str, PatternConfig]) -> list[PatternConfig]:
    """A pattern and those that it asks."""
    found = [patterns[name]]
    for inner in needs_of(patterns[name]).patterns:
        found += _asked(inner, patterns)
    return found


def max_bytes_of(node: NodeBase | None) -> int:
    """Longest text of a result that others see, in bytes; `None`: one of the words."""
    match node:
        case None:
            return WORD_BYTES
        case AskNode() | ToolNode() | RetrieveNode():
            return node.max_bytes
    return RESULT_BYTES


WORD_BYTES = 8192
"""Longest text of `item`, `answers`, `objections`, `subtask`."""
RESULT_BYTES = 8192
"""Longest text that others see of a node without a `max_bytes` of its own."""
