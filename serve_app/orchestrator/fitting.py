"""One conversation while it is shortened: its parts, what they cost, and what is left of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve_app.content import Message, pictures_of, text_of_content, with_pictures
from serve_app.orchestrator.likeness import TextLikeness, sentences
from serve_app.orchestrator.tokens import TokenCounter

LEAST_RESULT_TOKENS = 64
"""Of a tool result that is cut."""
_LAST_TURN_SHARE = 0.75
"""Of the room, that the last turn takes before its own tool results are cut."""
_MARK = "\n[... {chars} characters left out ...]\n"
_GAP = "[...]"
_QUESTION_CHARS = 4000
"""Of the question, that turns are compared with."""
_MAX_SENTENCES = 4000
"""Of turns that are left out, that are looked at; the last ones."""
_LEAST_SENTENCE_TOKENS = 8
"""Room below which no sentence is kept."""


@dataclass
class ConversationParts:
    """A conversation in its parts; messages are addressed by their places."""

    system: list[int] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=list)
    """Earlier turns, each from a user's message to the next one."""
    last: list[int] = field(default_factory=list)
    """From the last user's message on."""


class Fitting:
    """One conversation on its way to fit."""

    def __init__(
        self,
        model_id: str,
        messages: list[Message],
        counts: list[int],
        room: int,
        counter: TokenCounter,
    ) -> None:
        self.model_id = model_id
        self.messages = messages
        self.counts = counts
        """Tokens of each message."""
        self.room = room
        """Tokens for all messages."""
        self.parts = _parts(messages)
        self._counter = counter
        self._gone: set[int] = set()
        self._instead: dict[int, list[Message]] = {}
        """By the place where a turn began that is gone: what stands in its place."""
        self._added = 0
        """Tokens of what was put in."""

    @property
    def fixed(self) -> int:
        """Tokens of what stays whole."""
        return self.cost(self.parts.system) + self.cost(self.parts.last)

    @property
    def total(self) -> int:
        """Tokens of what is there now."""
        return (
            self.cost([n for n in range(len(self.messages)) if n not in self._gone]) + self._added
        )

    def cost(self, places: Sequence[int]) -> int:
        """Tokens of some messages."""
        return sum(self.counts[place] for place in places)

    def text(self, places: Sequence[int]) -> str:
        """What some messages say."""
        said = (text_of_content(self.messages[place].get("content")) for place in places)
        return "\n".join(text for text in said if text)

    @property
    def question(self) -> str:
        """The end of what the last turn begins with."""
        return self.text(self.parts.last[:1])[-_QUESTION_CHARS:]

    def kept(self) -> list[Message]:
        """The conversation as it is now."""
        kept: list[Message] = []
        for place, message in enumerate(self.messages):
            kept += self._instead.get(place, [])
            if place not in self._gone:
                kept.append(message)
        return kept

    def leave_out(self, turns: Sequence[Sequence[int]]) -> None:
        """Leave turns out."""
        self._gone.update(place for turn in turns for place in turn)

    async def cut_results(self) -> int:
        """Cut tool results: those of earlier turns, then, if it has to be, of the last one.

        Returns:
            How many were cut.
        """
        earlier = [place for turn in self.parts.turns for place in turn]
        num_cut = await self._cut(earlier, self.room - self.total)
        most = int(self.room * _LAST_TURN_SHARE)
        if self.fixed > self.room and self.cost(self.parts.system) < most:
            num_cut += await self._cut(self.parts.last, most - self.fixed)
        return num_cut

    async def _cut(self, places: Sequence[int], left: int) -> int:
        """Cut the longest results among some messages so that they take `-left` tokens less."""
        results = [place for place in places if self.messages[place]["role"] == "tool"]
        if left >= 0 or not results:
            return 0
        cap = _cap([self.counts[place] for place in results], left)
        (mark,) = await self._counter.of_texts(self.model_id, [_MARK])
        mark += self._counter.per_message(self.model_id)
        num_cut = 0
        for place in results:
            if self.counts[place] <= cap:
                continue
            old = self.messages[place].get("content")
            shorter = cut_in_the_middle(
                text_of_content(old), max(0, cap - mark) / self.counts[place]
            )
            self.messages[place] = {
                **self.messages[place],
                "content": with_pictures(shorter, pictures_of(old)),
            }
            num_cut += 1
            (self.counts[place],) = await self._counter.of_messages(
                self.model_id, [self.messages[place]]
            )
        return num_cut

    async def begin_with(self, summary: str, room: int) -> bool:
        """Put a summary before the turns that stay; whether there is room for it."""
        pair = [
            {"role": "user", "content": "[Earlier turns, summed up]"},
            {"role": "assistant", "content": summary},
        ]
        added = sum(await self._counter.of_messages(self.model_id, pair))
        if added > room:
            return False
        self._instead[self.parts.turns[0][0]], self._added = pair, added
        return True

    async def keep_sentences(self, turns: Sequence[Sequence[int]], room: int) -> int:
        """Keep the sentences of turns that share words with the question, as far as there is room.

        Returns:
            How many are kept.
        """
        begun = 2 * self._counter.per_message(self.model_id) + 8  # two messages, and their gaps
        said, scores = await asyncio.to_thread(self._compared, turns)
        picked: dict[int, dict[int, list[str]]] = {}
        known = set[str]()
        num_kept = 0
        for number in np.argsort(-scores, kind="stable"):
            turn, place, sentence = said[int(number)]
            if scores[number] <= 0 or room < _LEAST_SENTENCE_TOKENS:
                break
            (tokens,) = await self._counter.of_texts(self.model_id, [f" {_GAP} {sentence}"])
            cost = tokens + 1 + (0 if turn in picked else begun)
            if cost > room or sentence in known:
                continue
            known.add(sentence)
            room -= cost
            self._added += cost
            picked.setdefault(turn, {}).setdefault(place, []).append(sentence)
            num_kept += 1
        for turn, by_place in picked.items():
            self._put(turns[turn], by_place)
        return num_kept

    def _compared(
        self, turns: Sequence[Sequence[int]]
    ) -> tuple[list[tuple[int, int, str]], NDArray[np.float64]]:
        """The sentences of turns, each with its turn and its place, and how like they are."""
        said = [
            (turn, place, sentence)
            for turn, places in enumerate(turns)
            for place in places
            if self.messages[place]["role"] in ("user", "assistant")
            for sentence in sentences(text_of_content(self.messages[place].get("content")))
        ][-_MAX_SENTENCES:]
        return said, TextLikeness.by_words(self.question, [text for _, _, text in said])

    def _put(self, turn: Sequence[int], by_place: dict[int, list[str]]) -> None:
        """Have a turn say a few sentences: one message of the user's, and one of the model's."""
        by_role: dict[str, list[str]] = {"user": [], "assistant": []}
        for place in sorted(by_place):
            by_role[self.messages[place]["role"]] += by_place[place]
        self._instead[turn[0]] = [
            {"role": role, "content": f" {_GAP} ".join(texts) or _GAP}
            for role, texts in by_role.items()
        ]


def _parts(messages: Sequence[Message]) -> ConversationParts:
    parts = ConversationParts()
    turns: list[list[int]] = [[]]
    for place, message in enumerate(messages):
        if message["role"] == "system":
            parts.system.append(place)
            continue
        if message["role"] == "user" and turns[-1]:
            turns.append([])
        turns[-1].append(place)
    *parts.turns, parts.last = turns
    return parts


def _cap(sizes: Sequence[int], left: int) -> int:
    """The most tokens of a result, so that all of them take `-left` tokens less, if that can be."""
    allowed, cap = sum(sizes) + left, 0
    for rank, size in enumerate(sorted(sizes)):
        cap = allowed // (len(sizes) - rank)  # if this one and all larger ones are cut
        if size > cap:
            break
        allowed -= size
    return max(cap, LEAST_RESULT_TOKENS)


def cut_in_the_middle(text: str, share: float) -> str:
    """The beginning and the end of a text, together at most about a share of it."""
    keep = max(0, int(len(text) * share) - len(_MARK))
    head = (keep + 1) // 2
    tail = len(text) - (keep - head)
    return text[:head] + _MARK.format(chars=tail - head) + text[tail:]
