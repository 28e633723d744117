"""The desired pool: what the file says, what admins changed since, and which word counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.config import AtlasConfig, CustomModelConfig, PriceConfig
from serve_app.config.patterns.check import members_of_patterns
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.tools import (
    BestOfConfig,
    CalculatorConfig,
    CustomToolConfig,
    NoneConfig,
    ToolsetConfig,
)
from serve_app.errors import Conflict, InvalidRequest, NotFound
from serve_app.pool import desired
from serve_app.pool.desired import DesiredPool
from serve_app.store import PoolRevision, Store, add_pool, newest_pool

CALCULATOR = {"type": "calculator", "tool_id": "calculator"}


def model(model_id: str, **settings: Any) -> dict[str, Any]:
    return {"type": "custom", "model_id": model_id, "import_path": "a.b:C", **settings}


def config(*models: dict[str, Any], tools: tuple[dict[str, Any], ...] = (), **rest: Any) -> Any:
    rest = {"pool": {"allow_custom_models": True}} | rest
    return AtlasConfig.model_validate({"models": list(models), "tools": list(tools), **rest})


FILE = config(model("a", tools=["none", "calculator"]), model("b"), tools=(CALCULATOR,))


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


def ids(pool: AtlasConfig) -> list[str]:
    return [settings.model_id for settings in pool.models]


async def test_before_the_first_change_the_pool_is_the_files(store: Store) -> None:
    assert await DesiredPool(FILE, store).current() == FILE


async def test_the_same_file_twice_is_one_revision(store: Store) -> None:
    first = await DesiredPool(FILE, store).apply_file()
    again = await DesiredPool(FILE, store).apply_file()
    assert (first.revision, again.revision) == (1, 1)


async def test_a_model_added_by_an_admin_outlives_the_files_next_reading(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    await pool.apply_file()
    revision = await pool.add_model(CustomModelConfig(**model("c")))
    assert (await pool.apply_file()).revision == revision
    assert ids(await pool.current()) == ["a", "b", "c"]


async def test_a_model_removed_by_an_admin_does_not_come_back_with_the_same_file(
    store: Store,
) -> None:
    pool = DesiredPool(FILE, store)
    await pool.remove_model("b")
    await DesiredPool(FILE, store).apply_file()
    assert ids(await pool.current()) == ["a"]


async def test_an_edited_file_changes_only_what_was_edited(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    await pool.set_price("b", PriceConfig(usd_per_1m_prompt_tokens=7.0))
    edited = config(
        model("a", tools=["none", "calculator"], max_ongoing_requests=5),
        model("b"),
        model("new"),
        tools=(CALCULATOR,),
    )
    after = DesiredPool(edited, store)
    await after.apply_file()
    wanted = await after.current()
    assert ids(wanted) == ["a", "b", "new"]
    assert wanted.model("a").max_ongoing_requests == 5
    assert wanted.model("b").price.usd_per_1m_prompt_tokens == 7.0


async def test_the_file_has_the_last_word_on_a_member_whose_text_changed(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    await pool.set_price("b", PriceConfig(usd_per_1m_prompt_tokens=7.0))
    price = {"usd_per_1m_prompt_tokens": 9.0}
    edited = config(
        model("a", tools=["none", "calculator"]), model("b", price=price), tools=(CALCULATOR,)
    )
    after = DesiredPool(edited, store)
    await after.apply_file()
    assert (await after.current()).model("b").price.usd_per_1m_prompt_tokens == 9.0


async def test_a_model_taken_out_of_the_file_goes(store: Store) -> None:
    await DesiredPool(FILE, store).apply_file()
    after = DesiredPool(config(model("b")), store)
    await after.apply_file()
    wanted = await after.current()
    assert (ids(wanted), wanted.tools) == (["b"], ())


async def test_a_second_model_of_one_id_is_a_conflict(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    with pytest.raises(Conflict, match="'a' is in the pool"):
        await pool.add_model(CustomModelConfig(**model("a")))


async def test_the_only_model_cannot_be_removed(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    await pool.remove_model("a")
    with pytest.raises(InvalidRequest, match="the only one"):
        await pool.remove_model("b")
    assert ids(await pool.current()) == ["b"]


async def test_the_last_model_that_answers_cannot_be_removed(store: Store) -> None:
    pool = DesiredPool(config(model("a"), model("judge", role="verifier")), store)
    with pytest.raises(InvalidRequest, match="a pool needs one that answers"):
        await pool.remove_model("a")
    assert ids(await pool.current()) == ["a", "judge"]


@pytest.mark.parametrize("what", ["update_model", "remove_model", "set_price", "remove_tool"])
async def test_what_is_not_there_cannot_be_changed(store: Store, what: str) -> None:
    pool = DesiredPool(FILE, store)
    changes = {
        "update_model": lambda: pool.update_model(CustomModelConfig(**model("z"))),
        "remove_model": lambda: pool.remove_model("z"),
        "set_price": lambda: pool.set_price("z", PriceConfig()),
        "remove_tool": lambda: pool.remove_tool("z"),
    }
    with pytest.raises(NotFound, match="'z'"):
        await changes[what]()


async def test_a_model_with_an_unknown_tool_is_refused(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    with pytest.raises(InvalidRequest, match="names tool 'abacus'"):
        await pool.add_model(CustomModelConfig(**model("c", tools=["abacus"])))


async def test_a_removed_tool_takes_its_pairs_along(store: Store) -> None:
    cards = [{"pair": "a@calculator", "examples": ["1 + 1"]}]
    whole = config(
        model("a", tools=["calculator"]),
        model("b"),
        tools=(CALCULATOR,),
        pairs=cards,
        router={"fallback": "a@calculator"},
    )
    pool = DesiredPool(whole, store)
    await pool.remove_tool("calculator")
    wanted = await pool.current()
    assert [str(pair) for pair in wanted.all_pairs()] == ["a@none", "b@none"]
    assert (wanted.tools, wanted.pairs, wanted.router.fallback) == ((), (), None)


async def test_a_tool_joins_the_models_it_is_given_to(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    await pool.add_tool(BestOfConfig(tool_id="best"), ("b",))
    await pool.add_tool(NoneConfig(tool_id="plain"), None)
    wanted = await pool.current()
    assert wanted.model("a").tools == ("none", "calculator", "plain")
    assert wanted.model("b").tools == ("none", "best", "plain")
    with pytest.raises(Conflict, match="'best' is in the pool"):
        await pool.add_tool(BestOfConfig(tool_id="best"), None)
    with pytest.raises(NotFound, match="no model 'z'"):
        await pool.add_tool(CalculatorConfig(tool_id="other"), ("z",))


async def test_a_tool_given_to_all_is_not_given_to_verifiers(store: Store) -> None:
    with_judge = config(model("a"), model("judge", role="verifier"))
    pool = DesiredPool(with_judge, store)
    await pool.add_tool(CalculatorConfig(tool_id="calculator"), None)
    wanted = await pool.current()
    assert wanted.model("a").tools == ("none", "calculator")
    assert wanted.model("judge").tools == ("none",)


DESK = {
    "type": "toolset",
    "tool_id": "desk",
    "description": "sums",
    "members": ["calculator", "other"],
}
OTHER = {"type": "calculator", "tool_id": "other"}


def members(pool: AtlasConfig) -> dict[str, tuple[str, ...]]:
    return {tool.tool_id: tool.members for tool in pool.tools if isinstance(tool, ToolsetConfig)}


async def test_a_removed_member_leaves_its_toolset_and_the_last_one_takes_it_along(
    store: Store,
) -> None:
    whole = config(model("a", tools=["desk"]), tools=(CALCULATOR, OTHER, DESK))
    pool = DesiredPool(whole, store)
    await pool.remove_tool("other")
    assert members(await pool.current()) == {"desk": ("calculator",)}
    await pool.remove_tool("calculator")
    wanted = await pool.current()
    assert members(wanted) == {}
    assert wanted.model("a").tools == ("none",)
    await pool.add_tool(CalculatorConfig(tool_id="other"), ())
    wanted = await pool.current()
    assert members(wanted) == {"desk": ("other",)}
    assert wanted.model("a").tools == ("desk",)


async def test_a_toolset_that_cannot_work_is_refused(store: Store) -> None:
    named = {"names": ["calculator"]}
    own = {"type": "custom", "tool_id": "own", "import_path": "tests.own_tools:Named"}
    pool = DesiredPool(config(model("a"), tools=(CALCULATOR, own | {"settings": named})), store)
    with pytest.raises(InvalidRequest, match="names tool 'other'; the pool has: "):
        await pool.add_tool(ToolsetConfig.model_validate(DESK), None)
    clash = DESK | {"members": ["calculator", "own"]}
    with pytest.raises(InvalidRequest, match="'calculator' and 'own' both have a function"):
        await pool.add_tool(ToolsetConfig.model_validate(clash), None)
    assert members(await pool.current()) == {}


async def test_a_class_that_cannot_be_a_tool_is_refused(store: Store) -> None:
    pool = DesiredPool(config(model("a"), pool={"allow_custom_tools": True}), store)
    own = CustomToolConfig(tool_id="own", import_path="tests.own_tools:Broken")
    with pytest.raises(InvalidRequest, match="cannot be made"):
        await pool.add_tool(own, None)


async def test_changes_at_once_all_land(store: Store, store_url: str) -> None:
    elsewhere = await Store.open(store_url)
    try:
        await DesiredPool(FILE, store).apply_file()
        pools = [DesiredPool(FILE, store), DesiredPool(FILE, elsewhere)]
        names = [f"m{number}" for number in range(6)]
        revisions = await asyncio.gather(
            *(
                pools[number % 2].add_model(CustomModelConfig(**model(name)))
                for number, name in enumerate(names)
            )
        )
        assert sorted(ids(await pools[0].current())) == ["a", "b", *names]
    finally:
        await elsewhere.close()
    assert sorted(revisions) == list(range(2, 8))


async def test_a_change_names_its_own_revision_where_another_follows_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = DesiredPool(FILE, store)
    first = await pool.apply_file()

    async def overtaken(*args: Any, **members: Any) -> PoolRevision | None:
        written = await add_pool(*args, **members)
        await add_pool(store, first.revision + 2, **members)
        return written

    monkeypatch.setattr(desired, "add_pool", overtaken)
    added = await pool.add_model(CustomModelConfig(**model("c")))
    newest = await newest_pool(store)
    assert newest is not None
    assert (added, newest.revision) == (first.revision + 1, first.revision + 2)


async def test_every_revision_says_what_it_changed(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    told = []
    for change in (
        pool.add_model(CustomModelConfig(**model("c"))),
        pool.set_price("c", PriceConfig()),
        pool.remove_tool("calculator"),
        pool.remove_model("c"),
    ):
        await change
        newest = await newest_pool(store)
        assert newest is not None
        told.append(newest.change)
    assert told == [
        "added model c",
        "changed the price of model c",
        "removed tool calculator",
        "removed model c",
    ]


def pattern(name: str, pair: str = "a", **fields: Any) -> PatternConfig:
    node = {"ask": {"pair": pair} | fields}
    return PatternConfig.model_validate({"name": name, "do": [node]})


def names(pool: AtlasConfig) -> list[str]:
    return [of.name for of in pool.patterns]


async def test_a_pattern_is_added_changed_and_removed(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    assert (await pool.put_pattern(pattern("p")))[1]
    assert not (await pool.put_pattern(pattern("p", "b")))[1]
    assert (await pool.current()).patterns == (pattern("p", "b"),)
    await pool.remove_pattern("p")
    assert names(await pool.current()) == []


async def test_a_pattern_that_names_what_is_not_there_is_refused(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="there is no pair 'z@none'"):
        await DesiredPool(FILE, store).put_pattern(pattern("p", "z"))


async def test_a_model_goes_and_the_patterns_that_need_it_stay(store: Store) -> None:
    pool = DesiredPool(FILE, store)
    await pool.put_pattern(pattern("p", "b"))
    await pool.remove_model("b")
    wanted = await pool.current()
    (member,) = members_of_patterns(wanted)
    assert (names(wanted), member.missing) == (["p"], "there is no pair 'b@none' in the pool")


async def test_a_pattern_of_the_file_follows_the_file(store: Store) -> None:
    before = config(model("a"), patterns=[pattern("p").as_written()])
    await DesiredPool(before, store).apply_file()
    after = DesiredPool(config(model("a"), patterns=[pattern("q").as_written()]), store)
    await after.apply_file()
    assert names(await after.current()) == ["q"]


async def test_a_function_can_be_named_in_the_file_alone(store: Store) -> None:
    node = {"parallel": {"do": [{"ask": {"pair": "a"}}], "function": "os:getcwd"}}
    evil = PatternConfig.model_validate({"name": "p", "do": [node]})
    with pytest.raises(InvalidRequest, match="'os:getcwd' is code"):
        await DesiredPool(FILE, store).put_pattern(evil)
