"""Patterns as they are written: what is read, and what is refused with its place named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import load_config
from serve_app.config.patterns.bound import bound_of
from serve_app.config.patterns.check import (
    check_pattern,
    members_of_patterns,
    tail_asks,
    unmet,
    walk,
)
from serve_app.config.patterns.files import read_pattern, read_patterns
from serve_app.config.patterns.language import AskNode, BranchNode, Condition, PatternConfig
from serve_app.config.patterns.template import Reference, Template, cut, filled, references_in
from serve_app.errors import ConfigError
from serve_app.orchestrator.patterns.view import _holds
from serve_app.pool.desired import members_of, with_pool
from tests.pattern_fakes import PatternBench, pattern, pattern_config

EVERY_NODE = """
name: every-node
answers: all of it
examples: ["What is it?"]
limits: {usd: 0.5, seconds: 30}
do:
  - retrieve: {id: found, corpus: handbook, top_k: 2}
  - refuse: {when: {found.count: {lt: 0}}, say: "no"}
  - tool: {id: sum, tool: calculator, arguments: {expression: "1 + 2"}}
  - ask: {id: label, pair: small, prompt: "Label {{question}}", output: {properties: {kind: {}}}}
  - branch:
      id: way
      cases: [{when: {label.data.kind: {eq: a}}, do: [{ask: {pair: small}}]}]
      else: [{ask: {pair: large}}]
  - parallel: {id: both, do: [{ask: {pair: small}}], each: [x, y]}
  - vote: {id: most, of: [{ask: {pair: small}}, {ask: {pair: large}}]}
  - cascade: {of: [{ask: {pair: small}}, {ask: {pair: large}}], accept: {agrees: true}}
  - critique:
      draft: {ask: {pair: small}}
      critics: [{verify: {of: draft, check: length}}, {ask: {pair: large, prompt: "{{draft}}"}}]
      revise: {ask: {pair: large, prompt: "{{draft}} {{objections}}"}}
  - plan:
      id: planned
      lead: {ask: {pair: lead}}
      worker: {ask: {prompt: "{{subtask}}"}}
      join: {ask: {pair: lead, prompt: "{{answers}}"}}
  - verify: {of: planned, check: pattern, pattern: ".+", else: keep}
"""


def refusal(text: str, *others: str, folder: Path) -> str:
    """Why a pattern is refused."""
    with pytest.raises(ConfigError) as refused:
        pattern_config(folder, text, *others)
    return refused.value.message


def unreadable(text: str) -> str:
    """Why a pattern cannot be read."""
    with pytest.raises(ValidationError) as refused:
        pattern(text)
    return str(refused.value)


def test_every_kind_of_node_is_read(tmp_path: Path) -> None:
    (read,) = pattern_config(tmp_path, EVERY_NODE).patterns
    assert [node.kind for node in read.do] == [
        "retrieve", "refuse", "tool", "ask", "branch", "parallel", "vote", "cascade", "critique",
        "plan", "verify",
    ]  # fmt: skip


def test_a_pattern_survives_being_written_as_json() -> None:
    read = pattern(EVERY_NODE)
    assert PatternConfig.model_validate_json(json.dumps(read.as_written())) == read


def test_what_is_written_has_no_defaults() -> None:
    written = pattern("{name: a, do: [{ask: {pair: small}}]}").as_written()
    assert written == {"name": "a", "do": [{"ask": {"pair": "small"}}]}


def test_a_node_without_fields_is_its_kind_alone() -> None:
    assert pattern("{name: a, do: [{ask: }]}").do == (AskNode(),)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("{ask: {}, tool: {}}", "a node has one key"),
        ("{}", "a node has one key"),
        ("{loop: {do: []}}", "loop"),
        ("{ask: [small]}", "its fields are needed, got list"),
        ("{ask: {pairs: small}}", "pairs"),
        ("{ask: {prompt: 'a {{b'}}", "without a reference"),
        ("{ask: {prompt: '{{a + 1}}'}}", "is no reference"),
        ("{ask: {prompt: '{{a.__class__()}}'}}", "is no reference"),
        ("{refuse: {say: no}}", "valid string"),
        ("{ask: {system: x}}", "only with a prompt"),
        ("{ask: {pair: small, route: {alpha: 1}}}", "only with 'pair: route'"),
        ("{ask: {output: {type: string}}}", "'properties' is needed"),
        ("{ask: {output: {properties: {a: {type: text}}}}}", "it is no JSON schema"),
        ("{ask: {output: {properties: {a: {$ref: 'http://x/y'}}}}}", "refers to itself alone"),
        ("{vote: {of: [{ask: }]}}", "at least 2"),
        ("{parallel: {do: [{ask: }], quorum: 2}}", "can never be reached"),
        ("{parallel: {do: [{ask: }, {ask: }], each: [x]}}", "exactly one node"),
        ("{cascade: {of: [{ask: }, {ask: }], accept: {}}}", "name min_logprob"),
        ("{cascade: {of: [{ask: }, {ask: }], accept: {pattern: '('}}}", "is no RE2 expression"),
        ("{verify: {of: a, check: pattern, pattern: '(?=a)'}}", "is no RE2 expression"),
        ("{verify: {of: a, check: pattern}}", "pattern: goes with"),
        ("{verify: {of: a, check: length, tool: python}}", "tool: goes with"),
        ("{refuse: {when: {a.count: {}}}}", "name a condition"),
        ("{refuse: {when: {a.count: {eq: null}}}}", "name a condition"),
        ("{refuse: {when: {'a b': {eq: 1}}}}", "is no reference"),
    ],
)
def test_a_wrong_node_is_refused_with_the_reason(node: str, said: str) -> None:
    assert said in unreadable(f"{{name: a, do: [{node}]}}")


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a" * 49, "a:b"])
def test_a_name_that_cannot_be_named_is_refused(name: str) -> None:
    assert "name" in unreadable(f"{{name: {name!r}, do: [{{ask: }}]}}")


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("{ask: {id: x, prompt: '{{y}}'}}", "node x: there is no 'y' before it"),
        ("{ask: {prompt: '{{y}}'}}", "node do[0].ask: there is no 'y' before it"),
        ("{ask: {id: x, prompt: '{{x}}'}}", "there is no 'x' before it"),
        ("{ask: {uses: [y]}}", "there is no 'y' before it"),
        ("{ask: {cite: y}}", "there is no 'y' before it"),
        ("{ask: {uses: [question]}}", "'question' is no result"),
        ("{verify: {of: question, check: length}}", "'question' is no result"),
        ("{ask: {prompt: '{{question.count}}'}}", "'question' is a text"),
        ("{refuse: {when: {y.count: {lt: 1}}}}", "there is no 'y' before it"),
        ("{tool: {tool: calculator, arguments: {a: ['{{y}}']}}}", "there is no 'y' before it"),
        ("{ask: {id: question}}", "the id 'question' is taken"),
        ("{ask: {id: x}}, {ask: {id: x}}", "node x: the id 'x' is taken"),
        ("{ask: {id: x}}, {ask: {prompt: '{{x.sources}}'}}", "a result has text, count"),
        ("{ask: {id: x}}, {ask: {prompt: '{{x.data.a}}'}}", "'x' has no 'output'"),
        (
            "{ask: {id: x, output: {properties: {a: {}}}}}, {ask: {prompt: '{{x.data.b}}'}}",
            "'output' has no 'b'",
        ),
        ("{parallel: {do: [{ask: {id: x}}]}}, {ask: {prompt: '{{x}}'}}", "there is no 'x'"),
        ("{parallel: {do: [{ask: {prompt: '{{item}}'}}]}}", "there is no 'item'"),
        ("{ask: {stream: true}}, {ask: {pair: small}}", "node do[0].ask: stream: only the last"),
        (
            "{critique: {draft: {ask: }, critics: [{verify: {of: question, check: length}}], "
            "revise: {ask: }}}",
            "'of: draft'",
        ),
    ],
)
def test_a_reference_to_what_is_not_there_is_refused(tmp_path: Path, do: str, said: str) -> None:
    message = refusal(f"{{name: a, do: [{do}]}}", folder=tmp_path)
    assert "pattern 'a'" in message
    assert said in message


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("{ask: {pair: nobody}}", "there is no pair 'nobody@none'"),
        ("{ask: {pair: small@python}}", "there is no pair 'small@python'"),
        ("{ask: {pair: judge}}", "there is no pair 'judge@none'"),
        ("{ask: {pair: 'pattern:b'}}", "there is no pattern 'b'"),
        ("{ask: {route: {models: [nobody]}}}", "'route' allows no pair"),
        ("{tool: {tool: hammer}}", "there is no tool 'hammer'"),
        ("{retrieve: {corpus: python}}", "'python' is no retrieval tool"),
        ("{ask: {id: x}}, {verify: {of: x, check: examples, tool: calculator}}", "no debug tool"),
        ("{ask: {id: x}}, {verify: {of: x, check: verifier, verifier: small}}", "role 'verifier'"),
    ],
)
def test_a_name_that_the_pool_lacks_is_refused(tmp_path: Path, do: str, said: str) -> None:
    assert said in refusal(f"{{name: a, do: [{do}]}}", folder=tmp_path)


def test_an_answer_must_stand_directly_under_do(tmp_path: Path) -> None:
    text = "{name: a, do: [{parallel: {do: [{ask: {id: x}}]}}], answer: x}"
    assert "answer: there is no node 'x'" in refusal(text, folder=tmp_path)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = "{name: a, do: [{ask: {pair: small}}]}"
    assert "more than once" in refusal(text, text, folder=tmp_path)


def test_patterns_that_ask_each_other_are_refused_with_the_way(tmp_path: Path) -> None:
    first = "{name: a, do: [{ask: {pair: 'pattern:b'}}]}"
    second = "{name: b, do: [{ask: {pair: 'pattern:a'}}]}"
    assert "a -> b -> a" in refusal(first, second, folder=tmp_path)


def test_a_cycle_that_slips_in_makes_its_patterns_unavailable(tmp_path: Path) -> None:
    config = pattern_config(tmp_path, "{name: a, do: [{ask: {pair: small}}]}")
    first = pattern("{name: a, do: [{ask: {pair: 'pattern:b'}}]}")
    second = pattern("{name: b, do: [{ask: {pair: 'pattern:a'}}]}")
    config = config.model_copy(update={"patterns": (first, second)})
    assert [str(member.missing) for member in members_of_patterns(config)] == [
        "it asks itself: a -> b -> a",
        "it asks itself: b -> a -> b",
    ]


def nested(depth: int) -> str:
    """A node inside as many others, less one."""
    node = "{ask: {pair: small}}"
    for _ in range(depth - 1):
        node = f"{{parallel: {{do: [{node}]}}}}"
    return node


def test_four_nodes_deep_is_deep_enough(tmp_path: Path) -> None:
    assert pattern_config(tmp_path, f"{{name: a, do: [{nested(4)}]}}").patterns
    assert "more than 4 deep" in refusal(f"{{name: a, do: [{nested(5)}]}}", folder=tmp_path)


def test_depth_counts_patterns_that_are_asked(tmp_path: Path) -> None:
    inner = f"{{name: b, do: [{nested(3)}]}}"
    outer = "{name: a, do: [{parallel: {do: [{ask: {pair: 'pattern:b'}}]}}]}"
    assert "pattern 'a': nodes are nested" in refusal(outer, inner, folder=tmp_path)


def test_a_changed_pattern_is_refused_where_one_that_asks_it_grows_too_deep(
    tmp_path: Path,
) -> None:
    config = pattern_config(
        tmp_path,
        "{name: a, do: [{parallel: {do: [{ask: {pair: 'pattern:b'}}]}}]}",
        "{name: b, do: [{ask: {pair: small}}]}",
    )
    deeper = pattern(f"{{name: b, do: [{nested(3)}]}}")
    with pytest.raises(ConfigError, match="pattern 'a': nodes are nested"):
        check_pattern(deeper, {of.name: of for of in config.patterns}, config)


def test_more_nodes_than_are_allowed_are_refused(tmp_path: Path) -> None:
    nodes = ", ".join(["{ask: {pair: small}}"] * 65)
    assert "at most 64 nodes, got 65" in refusal(f"{{name: a, do: [{nodes}]}}", folder=tmp_path)


def test_a_prompt_that_can_outgrow_its_cap_is_refused(tmp_path: Path) -> None:
    big = "{ask: {id: x, pair: small, max_bytes: 32768}}"
    prompt = "{{x}} and {{x}} and {{x}}"
    message = refusal(
        f"{{name: a, do: [{big}, {{ask: {{id: y, prompt: '{prompt}'}}}}]}}", folder=tmp_path
    )
    assert "pattern 'a', node y: the prompt may grow to 983" in message


def test_a_routable_pattern_cannot_route_through_another(tmp_path: Path) -> None:
    inner = "{name: b, do: [{ask: {pair: route}}]}"
    outer = "name: a\n{}do: [{{ask: {{pair: 'pattern:b'}}}}]"
    assert "cannot ask it through another" in refusal(outer.format(""), inner, folder=tmp_path)
    assert pattern_config(tmp_path, outer.format("routable: false\n"), inner).patterns


@pytest.mark.parametrize(
    ("do", "streaming"),
    [
        ("{ask: {id: x}}, {ask: {id: y}}", ["y"]),
        ("{ask: {id: x}}, {verify: {of: x, check: length}}", []),
        ("{ask: {id: x, output: {properties: {}}}}", []),
        ("{ask: {id: x, stream: false}}", []),
        ("{branch: {cases: [{when: {question: {empty: true}}, do: [{ask: {id: x}}]}]}}", ["x"]),
        ("{cascade: {of: [{ask: {id: x}}, {ask: {id: y}}], accept: {agrees: true}}}", ["y"]),
        ("{vote: {of: [{ask: {id: x}}, {ask: {id: y}}]}}", []),
    ],
)
def test_what_can_stream_is_known_when_the_pattern_is_read(do: str, streaming: list[str]) -> None:
    read = pattern(f"{{name: a, do: [{do}]}}")
    assert [ask.id for ask in tail_asks(read)] == streaming


def test_nodes_are_walked_with_what_is_inside_them() -> None:
    kinds = [node.kind for node in walk(pattern(EVERY_NODE).do)]
    assert len(kinds) == 25
    assert kinds.count("ask") == 14


# --- the pool changes ---------------------------------------------------------------------------


def test_a_removed_model_makes_its_patterns_unavailable_and_the_rest_still_loads(
    tmp_path: Path,
) -> None:
    config = pattern_config(
        tmp_path,
        "{name: a, do: [{ask: {pair: large}}]}",
        "{name: b, do: [{ask: {pair: 'pattern:a'}}]}",
        "{name: c, do: [{ask: {pair: small}}]}",
    )
    models, tools, patterns = members_of(config)
    del models["large"]
    changed = with_pool(config, models, tools, patterns)
    assert {member.name: member.missing for member in members_of_patterns(changed)} == {
        "a": "there is no pair 'large@none' in the pool",
        "b": "there is no pair 'large@none' in the pool",
        "c": None,
    }


def test_the_worst_case_of_an_unavailable_pattern_can_still_be_computed(tmp_path: Path) -> None:
    config = pattern_config(
        tmp_path,
        "{name: a, do: [{ask: {pair: 'pattern:b'}}]}",
        "{name: b, do: [{ask: {pair: small}}]}",
    )
    alone = config.model_copy(update={"patterns": config.patterns[:1]})
    assert bound_of(alone.patterns[0], alone, 100).tokens == 0


def test_a_member_says_which_pairs_one_of_has_to_be_there(tmp_path: Path) -> None:
    text = "{name: a, do: [{ask: {route: {models: [small]}}}, {ask: {pair: large}}]}"
    (member,) = members_of_patterns(pattern_config(tmp_path, text))
    assert {str(pair) for pair in member.pairs} == {"large@none"}
    assert [sorted(map(str, choice)) for choice in member.choices] == [
        ["small@calculator", "small@none"]
    ]


def test_what_is_unmet_is_told_once_for_each(tmp_path: Path) -> None:
    config = pattern_config(tmp_path, "{name: c, do: [{ask: {pair: small}}]}")
    read = pattern("{name: a, do: [{ask: {pair: x}}, {ask: {pair: x}}, {tool: {tool: y}}]}")
    assert len(unmet(read, {"a": read}, config)) == 2


# --- files --------------------------------------------------------------------------------------


def test_a_prompt_stands_in_a_file_beside_the_pattern(tmp_path: Path) -> None:
    (tmp_path / "ask.md").write_text("Say {{question}}\n")
    (tmp_path / "a.yaml").write_text("name: a\ndo: [{ask: {prompt: ask.md}}]")
    (node,) = read_pattern(tmp_path / "a.yaml").do
    assert isinstance(node, AskNode)
    assert node.prompt == "Say {{question}}"


def test_a_wrong_file_is_named_with_the_node(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\ndo: [{ask: {}}, {ask: {pears: 1}}]")
    with pytest.raises(ConfigError, match=r"(?s)a\.yaml.*do\.1\.ask\.pears"):
        read_pattern(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"name: [", "is not YAML"),
        (b"\xff\xfe\x00\xd8", "is not YAML"),
        (b"name: a\ndo: [{ask: {prompt: gone.md}}]", "cannot read prompt 'gone.md'"),
        (b"name: a\ndo: [{ask: {prompt: odd.md}}]", "'odd.md' is not UTF-8"),
        (b"- 1", "a.yaml"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, written: bytes, said: str) -> None:
    (tmp_path / "a.yaml").write_bytes(written)
    (tmp_path / "odd.md").write_bytes(b"\xff")
    with pytest.raises(ConfigError) as refused:
        read_pattern(tmp_path / "a.yaml")
    assert said in refused.value.message


def test_a_folder_stands_for_all_patterns_in_it(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.yaml").write_text(f"{{name: {name}, do: [{{ask: }}]}}")
    assert [read.name for read in read_patterns([str(tmp_path)])] == ["a", "b"]


def test_a_folder_without_a_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no YAML file"):
        read_patterns([str(tmp_path)])


def test_a_configuration_with_a_wrong_pattern_names_pattern_and_node(tmp_path: Path) -> None:
    models = [{"type": "remote", "model_id": "m", "base_url": "http://h/v1", "remote_model": "x"}]
    do = [{"ask": {"id": "one", "prompt": "{{two}}"}}]
    written: dict[str, Any] = {"models": models, "patterns": [{"name": "a", "do": do}]}
    (tmp_path / "atlas.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match="pattern 'a', node one: there is no 'two'"):
        load_config(tmp_path / "atlas.yaml")


# --- templates ----------------------------------------------------------------------------------


def test_references_are_filled_once() -> None:
    values = {"a": "{{b}}", "b": "never"}
    template = Template.parse("<{{a}}|{{ a }}>")
    assert template.fill(lambda reference: values[reference.name]) == "<{{b}}|{{b}}>"


def test_references_are_found_in_all_strings_of_a_value() -> None:
    value = {"x": ["{{a}}", 1, {"y": "{{b.data.k}}"}]}
    assert list(references_in(value)) == [Reference("a"), Reference("b", ("data", "k"))]
    assert filled(value, lambda reference: reference.name) == {"x": ["a", 1, {"y": "b"}]}


def test_single_braces_are_text() -> None:
    template = Template.parse('{"a": {"b": 1}}')
    assert list(template.references) == []
    assert template.literal_bytes == 15


@pytest.mark.parametrize("unit", ["{{" + " " * 9000, "{{" * 5000, "{{ a" * 5000 + "}}"])
def test_an_odd_text_is_refused_at_once(unit: str) -> None:
    began_s = time.process_time()
    with pytest.raises(ValueError, match="reference"):
        Template.parse(unit)
    assert time.process_time() - began_s < 1


def test_a_text_is_cut_between_characters() -> None:
    assert cut("äöü", 3) == "ä"


def test_a_text_that_is_shown_has_no_control_characters() -> None:
    assert cut("a\x00b\tc\n\x1b", 100) == "a b\tc\n "


async def test_text_of_a_model_with_references_in_it_stays_text(tmp_path: Path) -> None:
    bench = PatternBench(
        tmp_path,
        "{name: a, do: [{ask: {id: x, pair: small}}, {ask: {pair: large, prompt: 'Of: {{x}}'}}]}",
        says={"small": "{{question}} {{x}} {{"},
    )
    await bench.run("secret")
    assert bench.prompts("large") == ["Of: {{question}} {{x}} {{"]


async def test_a_result_is_shown_no_longer_than_its_node_says(tmp_path: Path) -> None:
    bench = PatternBench(
        tmp_path,
        "name: a\ndo: [{ask: {id: x, pair: small, max_bytes: 16, output: {properties: {k: {}}}}},"
        " {ask: {pair: large, prompt: '{{x}}|{{x.data.k}}|{{x.data}}'}}]",
        says={"small": json.dumps({"k": "v" * 100})},
    )
    await bench.run()
    shown = bench.prompts("large")[0].split("|")
    assert [len(part) for part in shown] == [16, 16, 16]


# --- predicates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ({"eq": "Yes"}, " yes\n", True),
        ({"eq": 3}, "3.0", True),
        ({"eq": 3}, "three", False),
        ({"eq": True}, True, True),
        ({"eq": True}, "true", False),
        ({"eq": 1}, True, False),
        ({"ne": "a"}, None, True),
        ({"lt": 1}, 0, True),
        ({"lt": 1}, 1, False),
        ({"le": 1}, 1, True),
        ({"gt": 0.5}, "0.75", True),
        ({"ge": 1}, None, False),
        ({"lt": 1}, True, False),
        ({"gt": 0, "lt": 5}, 7, False),
        ({"one_of": ["a", "B"]}, "b ", True),
        ({"one_of": ["a"]}, 1, False),
        ({"empty": True}, None, True),
        ({"empty": True}, " \n", True),
        ({"empty": True}, [], True),
        ({"empty": True}, 0, False),
        ({"empty": True}, False, False),
        ({"empty": False}, {"a": 1}, True),
    ],
)
def test_a_condition_compares_as_it_says(
    condition: dict[str, Any], value: Any, holds: bool
) -> None:
    assert _holds(Condition.model_validate(condition), value) is holds


def test_a_branch_reads_its_last_way_as_else() -> None:
    (node,) = pattern(
        "{name: a, do: [{branch: {cases: [{when: {question: {eq: x}}, do: [{ask: }]}], "
        "else: [{ask: {pair: small}}]}}]}"
    ).do
    assert isinstance(node, BranchNode)
    assert node.otherwise == (AskNode(pair="small"),)
