"""Conversations that are longer than a context: real tokenizers and the real runner of pairs, in
front of engines that do as they are told."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig
from serve_app.errors import ContextTooLong, EngineError
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.fitting import cut_in_the_middle
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.tokens import TokenCounter
from serve_app.orchestrator.trace import Span, SpanKind, Trace
from serve_app.schemas import ChatCall, Limits, Pair
from serve_app.tools.runner import ToolRunner
from tests.executor_fakes import reply
from tests.path2_fakes import Engines

WEIGHTS = Path("configs/nano/weights/nano-facts").absolute()
Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def chat(num_turns: int, words: str = "The weather is fine again today.") -> list[Message]:
    """Turns of small talk."""
    return [m for n in range(num_turns) for m in (user(f"Talk {n}. {words}"), assistant("Yes."))]


FACT = [user("The code of project Heron is 7431."), assistant("Noted.")]
QUESTION = user("Which code has project Heron?")
SYSTEM: Message = {"role": "system", "content": "Answer in short."}


class Topics:
    """Embeds a text onto the axes of the words that it has."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.texts: list[str] = []

    async def __call__(self, texts: list[str], deadline: Deadline) -> NDArray[np.float32]:
        self.texts += texts
        has = [[float(word in text.lower()) for word in self.words] + [0.1] for text in texts]
        vectors = np.array(has, np.float32)
        unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


class Bench:
    """A model `m` with a window, and a model `sum` without."""

    def __init__(
        self,
        folder: Path,
        window: int | None,
        *,
        local: bool = True,
        embed: Any = None,
        **context: Any,
    ) -> None:
        remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
        kind = {"type": "local", "model_source": str(WEIGHTS)} if local else remote
        model = kind | {"model_id": "m", "max_completion_tokens": 50}
        model["capabilities"] = {"context_tokens": window}
        self.config = AtlasConfig.model_validate(
            {
                "models": [model, remote | {"model_id": "sum"}],
                "data_dir": str(folder),
                "context": context,
            }
        )
        self.engines = Engines(says={"m": reply("an answer")})
        self.pairs = PairRunner(self.config, self.engines, ToolRunner([]), embed)
        self.trace = Trace("req_1")

    async def ask(self, *messages: Message, **sampling: Any) -> list[Message]:
        """What the engine is told."""
        call = ChatCall("req_1", "m", messages, sampling, Limits(alpha=0.0, deadline_s=30))
        budget = Budget(Deadline.after(30))
        await self.pairs.run(PairWork(Pair("m", "none"), call, budget, self.trace.root))
        told: list[Message] = self.body["messages"]
        return told

    @property
    def body(self) -> ChatBody:
        return self.engines.asked("m")[-1]

    @property
    def record(self) -> Span:
        (span,) = [s for s in self.trace.root.walk() if s.kind is SpanKind.CONTEXT]
        return span


def tokens_of(messages: list[Message]) -> int:
    """As the model's own template and tokenizer count."""
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return len(tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False).ids)


@pytest.mark.parametrize("window", [None, 100_000, 1500])
async def test_what_fits_goes_to_the_engine_as_it_came(tmp_path: Path, window: int | None) -> None:
    bench = Bench(tmp_path, window)
    messages = [SYSTEM, *FACT, *chat(20), QUESTION]
    assert await bench.ask(*messages) == messages
    assert bench.body["max_tokens"] == 50
    assert not [s for s in bench.trace.root.walk() if s.kind is SpanKind.CONTEXT]


async def test_turns_that_are_like_the_question_stay_with_the_newest_ones(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 400)
    told = await bench.ask(SYSTEM, *chat(2), *FACT, *chat(40), QUESTION)
    assert told[0] == SYSTEM
    assert told[-1] == QUESTION
    assert told[1:3] == FACT
    assert told[-3]["content"].startswith("Talk 39.")
    assert tokens_of(told) + 50 <= 400
    facts = bench.record.attributes
    assert facts["turns"] == 44
    assert facts["turns_left_out"] == 43 - (len(told) - 2) // 2
    assert str(facts["left_out"]).startswith("1-2,4-")
    assert int(facts["prompt_tokens"]) > 400 - 50 >= int(facts["kept_tokens"])


async def test_meaning_counts_where_no_word_is_the_same(tmp_path: Path) -> None:
    pet = [user("Our dog is called Rex."), assistant("Nice.")]
    conversation = (*chat(2), *pet, *chat(40), user("What name has my animal?"))
    assert pet[0] not in await Bench(tmp_path, 400).ask(*conversation)
    topics = Topics("dog", "animal")
    topics.words = ("dog",)

    async def embed(texts: list[str], deadline: Deadline) -> NDArray[np.float32]:
        return await topics([text.replace("animal", "dog") for text in texts], deadline)

    bench = Bench(tmp_path, 400, embed=embed)
    assert pet[0] in await bench.ask(*conversation)
    num_embedded = len(topics.texts)
    await bench.ask(*conversation)
    assert len(topics.texts) == num_embedded  # what was said before is known


async def test_without_an_embedder_in_time_words_decide(tmp_path: Path) -> None:
    async def away(texts: list[str], deadline: Deadline) -> NDArray[np.float32]:
        raise EngineError("it is away")

    told = await Bench(tmp_path, 400, embed=away).ask(*FACT, *chat(40), QUESTION)
    assert told[:2] == FACT


async def test_of_a_turn_that_is_too_long_its_sentences_stay(tmp_path: Path) -> None:
    talk = "It rained, and nobody went out. " * 60
    long = [user(f"{talk} The code of project Heron is 7431. {talk}"), assistant("I see. " * 40)]
    bench = Bench(tmp_path, 400)
    told = await bench.ask(*long, *chat(10), QUESTION)
    assert told[0] == user("The code of project Heron is 7431.")
    assert told[1]["role"] == "assistant"
    assert tokens_of(told) + 50 <= 400
    assert bench.record.attributes["sentences_kept"] == 1
    roles = [message["role"] for message in told]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


async def test_tool_results_are_cut_before_any_turn_is_left_out(tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = "begin " + "7 " * 3000 + "end"
    messages = [
        user("Look it up."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": result},
        assistant("Done."),
        QUESTION,
    ]
    bench = Bench(tmp_path, 400)
    told = await bench.ask(*messages)
    assert [m for m in told if m["role"] != "tool"] == [m for m in messages if m["role"] != "tool"]
    cut = told[2]["content"]
    assert cut.startswith("begin 7 ")
    assert cut.endswith(" 7 end")
    assert "characters left out" in cut
    assert tokens_of(told) + 50 <= 400
    facts = bench.record.attributes
    assert (facts["results_cut"], facts["turns_left_out"]) == (1, 0)


async def test_the_last_turns_own_results_are_cut_where_nothing_else_helps(tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7 " * 5000},
    ]
    told = await Bench(tmp_path, 400).ask(*chat(30), *last)
    assert [message for message in told[-3:] if message["role"] != "tool"] == last[:2]
    assert tokens_of(told) + 50 <= 400


async def test_what_cannot_fit_is_refused_before_any_call(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 400)
    with pytest.raises(ContextTooLong) as refused:
        await bench.ask(*chat(3), user("A long question. " * 400))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert not bench.engines.bodies
    with pytest.raises(ContextTooLong):
        await bench.ask(SYSTEM | {"content": "Rule. " * 1000}, QUESTION)


async def test_fitting_can_be_switched_off(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 400, fit=False)
    with pytest.raises(ContextTooLong):
        await bench.ask(*FACT, *chat(40), QUESTION)
    assert not bench.engines.bodies


@pytest.mark.parametrize(("max_tokens", "told"), [(30, 30), (50, 50), (None, 50)])
async def test_an_answer_keeps_its_room(tmp_path: Path, max_tokens: int | None, told: int) -> None:
    sampling = {} if max_tokens is None else {"max_tokens": max_tokens}
    bench = Bench(tmp_path, 80)
    with pytest.raises(ContextTooLong):
        await bench.ask(user("word " * 60), **sampling)
    bench = Bench(tmp_path, 200)
    await bench.ask(*chat(20), QUESTION, **sampling)
    assert bench.body["max_tokens"] == told


async def test_a_prompt_that_fits_leaves_the_answer_what_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 90)
    await bench.ask(QUESTION)
    assert 40 <= bench.body["max_tokens"] < 50


@pytest.mark.parametrize("local", [False, True])
async def test_what_an_engine_tells_makes_the_count_exact(tmp_path: Path, local: bool) -> None:
    window = 600 if local else 2000
    bench = Bench(tmp_path, window, local=local)
    conversation = [*chat(200), QUESTION]

    def counted(body: ChatBody) -> Any:
        return reply("ok", usage={"prompt_tokens": tokens_of(body["messages"])})

    bench.engines.says = {"m": counted}
    before = tokens_of(await bench.ask(*conversation))
    after = tokens_of(await bench.ask(*conversation))
    assert before * 1.2 < after <= window - 50


async def test_an_engine_that_refuses_a_prompt_is_counted_by_bounds_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 600, local=False)
    bench.engines.says = {"m": lambda body: reply("ok", usage={"prompt_tokens": 60})}
    await bench.ask(*chat(60), QUESTION)
    bench.engines.says = {"m": ContextTooLong("too long")}
    with pytest.raises(ContextTooLong):
        await bench.ask(*chat(60), QUESTION)
    bench.engines.says = {"m": "ok"}
    told = await bench.ask(*chat(60), QUESTION)
    assert sum(len(message["content"]) for message in told) <= 550


async def test_a_summary_takes_the_place_of_what_is_left_out_and_is_made_once(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, 600, summarizer="sum")
    bench.engines.says = {
        "m": reply("an answer", usage=None),
        "sum": "They spoke about the weather.",
    }
    told = await bench.ask(SYSTEM, *chat(60), QUESTION)
    assert told[2] == assistant("They spoke about the weather.")
    assert "Talk 1." in bench.engines.asked("sum")[0]["messages"][1]["content"]
    assert bench.record.attributes["summed_up"] is True
    asked = [span for span in bench.trace.root.walk() if span.name == "sum"]
    assert [span.usage.prompt_tokens for span in asked] == [10]  # it is paid
    await bench.ask(SYSTEM, *chat(60), QUESTION)
    assert len(bench.engines.asked("sum")) == 1


def test_a_summarizer_has_to_be_a_model_of_the_pool(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="summarizer"):
        Bench(tmp_path, 600, summarizer="nobody")


async def test_without_a_summary_sentences_are_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 600, summarizer="sum")
    bench.engines.says |= {"sum": EngineError("no")}
    long = [user("The code of project Heron is 7431. " + "It rained. " * 300), assistant("Yes.")]
    told = await bench.ask(*long, *chat(60), QUESTION)
    assert user("The code of project Heron is 7431.") in told
    assert bench.record.attributes["summed_up"] is False


async def test_a_model_that_cannot_be_read_is_counted_by_bytes(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "tokenizer.json").write_text("{}")
    counter = TokenCounter()
    model = Bench(tmp_path, 400).config.models[0].model_copy(update={"model_source": str(weights)})
    counter.use([model])
    assert await counter.of_texts("m", ["naïve", ""]) == [6, 0]
    shutil.rmtree(weights)
    counter.use([model])
    assert await counter.of_texts("m", ["naïve"]) == [6]


def test_the_length_of_a_context_is_read_from_the_weights(tmp_path: Path) -> None:
    def model(source: Path, **engine: Any) -> float:
        settings = {"type": "local", "model_id": "m", "engine_kwargs": engine}
        pool = {"models": [settings | {"model_source": str(source)}]}
        return AtlasConfig.model_validate(pool).models[0].able().context_tokens

    assert model(WEIGHTS) == 4096
    assert model(WEIGHTS, max_model_len=512) == 512
    for name, said in (
        ("sees", {"text_config": {"max_position_embeddings": 77}}),
        ("list", []),
        ("text", {"max_position_embeddings": "many"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(said))
    assert model(tmp_path / "sees") == 77
    assert model(tmp_path / "list") == model(tmp_path / "text") == model(tmp_path) == np.inf


async def test_a_hostile_conversation_does_not_hold_the_event_loop(tmp_path: Path) -> None:
    bench, told = Bench(tmp_path, 400), []
    longest_s, is_over = 0.0, False

    async def watch() -> None:
        nonlocal longest_s
        while not is_over:
            began_s = time.thread_time()  # of this thread alone: others may be busy
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.thread_time() - began_s)

    watching = asyncio.create_task(watch())
    for text in ("a.\n" * 700, "Heron? " * 300, "x" * 2000, "\u4e2d" * 700):
        told.append(await bench.ask(*chat(100, text), QUESTION))
    is_over = True
    await watching
    assert longest_s < 1.0
    assert all(tokens_of(messages) + 50 <= 400 for messages in told)


def test_a_text_is_cut_in_the_middle() -> None:
    cut = cut_in_the_middle("a" * 500 + "b" * 500, 0.5)
    assert cut.startswith("a" * 200)
    assert cut.endswith("b" * 200)
    assert len(cut) <= 520
