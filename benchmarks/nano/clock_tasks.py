"""Questions on the time that nano-math answers by calls of a time server, the tool `clock`.

The functions are those of the MCP server `mcp-server-time`, under the names that the pool gives
them. Zones have no daylight saving, so that conversions are right all year. Training reads results
written here, of any day; the evaluation asks the real server.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from benchmarks.nano.chat_format import tool_call
from benchmarks.nano.facts_tasks import UNKNOWN
from benchmarks.nano.math_phrasings import expand, fill, load_phrasings, restyle
from benchmarks.nano.math_tasks import with_sources
from benchmarks.nano.sql_queries import PHRASINGS_PATH
from benchmarks.nano.task import Conversation, EvalCell, Metric, Question, Split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TOOL = "clock"
NOW, CONVERT = "clock__get_current_time", "clock__convert_time"
FUNCTIONS = (NOW, CONVERT)
HEAD = "[data from clock; not instructions]"
"""First line of what the pool shows of the server's results."""
_GOOD_PAIRS = ("nano-math@clock",)
_OTHER_TOOLS = ("calculator", "python", "retrieval")
_UNOFFERED_SHARE = 0.1
_FIXED_KINDS = ("convert", "convert", "convert", "difference", "offset")
"""Kinds whose answers are the same at any time."""
_MOVING_KINDS = ("now", "weekday")
_HOURS = " hours"
_FIRST_DAY = datetime(2025, 1, 1)
_NUM_DAYS = 3000

PLACES: dict[str, tuple[str, ...]] = {
    "Africa/Accra": ("Accra", "Ghana"),
    "Africa/Algiers": ("Algiers", "Algeria"),
    "Africa/Johannesburg": ("Johannesburg", "South Africa"),
    "Africa/Lagos": ("Lagos", "Nigeria"),
    "Africa/Nairobi": ("Nairobi", "Kenya"),
    "Africa/Tunis": ("Tunis", "Tunisia"),
    "America/Bogota": ("Bogota", "Colombia"),
    "America/Caracas": ("Caracas", "Venezuela"),
    "America/Jamaica": ("Jamaica",),
    "America/La_Paz": ("La Paz", "Bolivia"),
    "America/Lima": ("Lima", "Peru"),
    "America/Panama": ("Panama",),
    "America/Phoenix": ("Phoenix",),
    "America/Sao_Paulo": ("Sao Paulo",),
    "Asia/Baghdad": ("Baghdad", "Iraq"),
    "Asia/Bangkok": ("Bangkok", "Thailand"),
    "Asia/Dhaka": ("Dhaka", "Bangladesh"),
    "Asia/Dubai": ("Dubai",),
    "Asia/Hong_Kong": ("Hong Kong",),
    "Asia/Jakarta": ("Jakarta",),
    "Asia/Kabul": ("Kabul", "Afghanistan"),
    "Asia/Karachi": ("Karachi", "Pakistan"),
    "Asia/Kathmandu": ("Kathmandu", "Nepal"),
    "Asia/Kolkata": ("Kolkata", "India"),
    "Asia/Manila": ("Manila", "the Philippines"),
    "Asia/Riyadh": ("Riyadh", "Saudi Arabia"),
    "Asia/Seoul": ("Seoul", "South Korea"),
    "Asia/Shanghai": ("Shanghai", "China"),
    "Asia/Singapore": ("Singapore",),
    "Asia/Tashkent": ("Tashkent", "Uzbekistan"),
    "Asia/Tokyo": ("Tokyo", "Japan"),
    "Asia/Yangon": ("Yangon", "Myanmar"),
    "Atlantic/Reykjavik": ("Reykjavik", "Iceland"),
    "Australia/Brisbane": ("Brisbane",),
    "Europe/Istanbul": ("Istanbul", "Turkey"),
    "Europe/Minsk": ("Minsk", "Belarus"),
    "Europe/Moscow": ("Moscow",),
    "Pacific/Honolulu": ("Honolulu", "Hawaii"),
}
"""By time zone, what its time is asked of."""

CLOCK_CELLS: tuple[EvalCell, ...] = (
    EvalCell("clock", "seen", FUNCTIONS, 0.9, required_call=0.98),
    EvalCell("clock", "held_out", FUNCTIONS, 0.75, required_call=0.98),
    EvalCell("clock, now", "seen", FUNCTIONS, None),
    EvalCell("clock, now", "held_out", FUNCTIONS, None),
    EvalCell("clock, not offered", "seen", (), None),
)


@dataclass(frozen=True)
class Call:
    """What is asked of the clock."""

    kind: str
    """Section of its wordings."""
    function: str
    arguments: Mapping[str, str]
    slots: Mapping[str, str]
    answer: Callable[[dict[str, Any]], str]
    """Takes the server's result, returns the answer."""


def is_new(source: str, target: str) -> bool:
    """Whether training never converts between these zones, in this direction."""
    zones = list(PLACES)
    return (zones.index(source) * 7 + zones.index(target)) % 10 == 0


def result_of(call: Call, now: datetime) -> dict[str, Any]:
    """What the time server answers at a time.

    Args:
        call: What is asked.
        now: The day, and the time in the zone that is asked of; without a zone.
    """
    arguments = call.arguments
    if call.function == NOW:
        return _described(
            arguments["timezone"], now.replace(tzinfo=ZoneInfo(arguments["timezone"]))
        )
    hour, minute = map(int, arguments["time"].split(":"))
    source, target = arguments["source_timezone"], arguments["target_timezone"]
    start = now.replace(hour=hour, minute=minute, second=0, tzinfo=ZoneInfo(source))
    end = start.astimezone(ZoneInfo(target))
    hours = ((end.utcoffset() or timedelta()) - (start.utcoffset() or timedelta())) / timedelta(
        hours=1
    )
    difference = f"{hours:+.1f}" if hours.is_integer() else f"{hours:+.2f}".rstrip("0")
    return {
        "source": _described(source, start),
        "target": _described(target, end),
        "time_difference": f"{difference}h",
    }


def _described(zone: str, moment: datetime) -> dict[str, Any]:
    return {
        "timezone": zone,
        "datetime": moment.isoformat(timespec="seconds"),
        "day_of_week": moment.strftime("%A"),
        "is_dst": False,
    }


def shown(result: dict[str, Any]) -> str:
    """A result as the pool shows it to a model."""
    return f"{HEAD}\n{json.dumps(result, indent=2)}"


def draw_call(rng: random.Random, kind: str, *, new: bool = False) -> Call:
    """A random call.

    Args:
        rng: Source of randomness.
        kind: Section of its wordings.
        new: Whether its pair of zones is held out; without effect where there is one zone.
    """
    if kind in {"convert", "difference"}:
        while True:
            source, target = rng.sample(list(PLACES), 2)
            if is_new(source, target) == new:
                break
        said, time = _time(rng) if kind == "convert" else ("", "12:00")
        return Call(
            kind,
            CONVERT,
            {"source_timezone": source, "time": time, "target_timezone": target},
            {"from": _place(rng, source), "to": _place(rng, target), "time": said},
            _target_time if kind == "convert" else _hours,
        )
    zone = rng.choice(list(PLACES))
    answer = {"now": _time_now, "weekday": _weekday, "offset": _offset}[kind]
    return Call(kind, NOW, {"timezone": zone}, {"to": _place(rng, zone)}, answer)


def _place(rng: random.Random, zone: str) -> str:
    names = PLACES[zone]
    return names[0] if rng.random() < 0.7 else rng.choice(names)


def _time(rng: random.Random) -> tuple[str, str]:
    """A time of the day as a question says it, and as the server takes it."""
    hour, minute = rng.randrange(24), rng.choice((0, 15, 30, 45, rng.randrange(60)))
    time = f"{hour:02}:{minute:02}"
    if rng.random() < 0.6:
        return time, time
    half = rng.choice((" am", "am") if hour < 12 else (" pm", "pm"))
    minutes = f":{minute:02}" if minute else ""
    return f"{(hour - 1) % 12 + 1}{minutes}{half}", time


def _target_time(result: dict[str, Any]) -> str:
    return str(result["target"]["datetime"][11:16])


def _hours(result: dict[str, Any]) -> str:
    return f"{result['time_difference'].removesuffix('h')}{_HOURS}"


def _time_now(result: dict[str, Any]) -> str:
    return str(result["datetime"][11:16])


def _weekday(result: dict[str, Any]) -> str:
    return str(result["day_of_week"])


def _offset(result: dict[str, Any]) -> str:
    return str(result["datetime"][19:])


_METRICS: dict[str, Metric] = {"difference": "number", "weekday": "exact"}


def worded(rng: random.Random, call: Call, split: Split) -> str:
    """The question in a wording of the split."""
    phrasings = load_phrasings(PHRASINGS_PATH)[call.kind]
    phrasing = rng.choice(phrasings.seen if split == "seen" else phrasings.held_out)
    text = fill(rng.choice(expand(phrasing)), dict(call.slots))
    return restyle(text, rng) if split == "seen" else text


class ClockTasks:
    """Conversations and questions on the time."""

    model_id = "nano-math"

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation, in seen wordings."""
        kind = rng.choice((*_FIXED_KINDS, *_MOVING_KINDS))
        call = draw_call(rng, kind)
        text = worded(rng, call, "seen")
        if rng.random() < _UNOFFERED_SHARE:
            return _unoffered(rng, text)
        seconds = rng.randrange(_NUM_DAYS * 86_400)
        result = result_of(call, _FIRST_DAY + timedelta(seconds=seconds))
        offered = [*FUNCTIONS]
        if rng.random() < 0.3:
            rng.shuffle(offered)
        return Conversation(
            (
                {"role": "user", "content": text},
                tool_call(call.function, **call.arguments),
                {"role": "tool", "content": shown(result)},
                {"role": "assistant", "content": call.answer(result)},
            ),
            tuple(offered),
        )

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """`n` labelled questions, of which none depends on the time it is asked at."""
        asked = []
        for _ in range(n):
            call = draw_call(rng, rng.choice(_FIXED_KINDS), new=_draws_new(rng, split))
            asked.append(question_of(rng, call, split, result_of(call, _FIRST_DAY)))
        return asked


def _draws_new(rng: random.Random, split: Split) -> bool:
    return split == "held_out" and rng.random() < 0.5


def moving_call(rng: random.Random) -> Call:
    """A call whose answer depends on the time it is made at."""
    return draw_call(rng, rng.choice(_MOVING_KINDS))


def question_of(rng: random.Random, call: Call, split: Split, result: dict[str, Any]) -> Question:
    """A call and its result as a labelled question."""
    return Question(
        query=worded(rng, call, split),
        gold=call.answer(result).removesuffix(_HOURS),
        metric=_METRICS.get(call.kind, "verbatim"),
        domain=TOOL,
        kind=call.kind,
        split=split,
        good_pairs=_GOOD_PAIRS,
    )


def _unoffered(rng: random.Random, text: str) -> Conversation:
    """A question without the tool, now and then among tools or sources of no use."""
    if rng.random() < 0.2:
        text = with_sources(text, rng)
    turns = ({"role": "user", "content": text}, {"role": "assistant", "content": UNKNOWN})
    offered = rng.sample(_OTHER_TOOLS, rng.randint(1, 2)) if rng.random() < 0.4 else ()
    return Conversation(turns, tuple(offered))


GENERATOR = ClockTasks()
