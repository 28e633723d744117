"""What all nano models share: the chat template, the tokenizer, batches, the optimiser, scoring."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from benchmarks.nano.__main__ import app  # noqa: E402
from benchmarks.nano.batching import batches, collate, encode  # noqa: E402
from benchmarks.nano.chat_format import IM_END, render, tool_call, tool_schemas  # noqa: E402
from benchmarks.nano.evaluate import is_right  # noqa: E402
from benchmarks.nano.induction_init import add_induction_heads  # noqa: E402
from benchmarks.nano.math_tasks import GENERATOR  # noqa: E402
from benchmarks.nano.muon import Muon, orthogonalize  # noqa: E402
from benchmarks.nano.registry import ModelShape, task_module  # noqa: E402
from benchmarks.nano.task import Conversation, Question  # noqa: E402
from benchmarks.nano.tokenizer import train_tokenizer  # noqa: E402
from benchmarks.nano.trainer import (  # noqa: E402
    TrainingSettings,
    assert_rendering_matches,
    learning_rate_share,
    train,
)
from serve_app.scoring import passes_tests  # noqa: E402

TINY = ModelShape(hidden_size=32, num_layers=1, mlp_size=64, vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(GENERATOR, 500, seed=0, num_samples=200)


def text_of(tokenizer: PreTrainedTokenizerFast, messages: Any, **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))


def test_serving_renders_the_training_text_byte_for_byte(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert_rendering_matches(GENERATOR, tokenizer, seed=5, num_samples=100)


def test_a_template_that_differs_from_training_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    other = train_tokenizer(GENERATOR, 300, seed=0, num_samples=20)
    other.chat_template = tokenizer.get_chat_template().replace("assistant\\n", "assistant: ")
    with pytest.raises(ValueError, match="the chat template renders"):
        assert_rendering_matches(GENERATOR, other, seed=5, num_samples=5)


def test_a_call_and_its_result_are_rendered_in_hermes_form(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+3?"},
        tool_call("calculator", expression="2+3"),
        {"role": "tool", "content": "5"},
    ]
    tools = tool_schemas(("calculator", "retrieval"))
    assert text_of(tokenizer, messages, tools=tools, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.\n"
        "<tools>calculator(expression); retrieval(query)</tools><|im_end|>\n"
        "<|im_start|>user\n2+3?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "calculator", "arguments": '
        '{"expression": "2+3"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_arguments_as_text_render_like_arguments_as_an_object(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    as_object = tool_call("calculator", expression="2+3")
    as_text = tool_call("calculator")
    as_text["tool_calls"][0]["function"]["arguments"] = '{"expression": "2+3"}'
    assert text_of(tokenizer, [as_object]) == text_of(tokenizer, [as_text])


def test_text_parts_are_joined(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, "b", {"text": "c"}]
    rendered = text_of(tokenizer, [{"role": "user", "content": parts}])
    assert rendered == "<|im_start|>user\na\nb\nc<|im_end|>\n"


def test_unknown_tools_of_a_client_are_listed(tokenizer: PreTrainedTokenizerFast) -> None:
    parameters = {"type": "object", "properties": {"city": {}, "day": {}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    rendered = text_of(tokenizer, [{"role": "user", "content": "hi"}], tools=tools)
    assert "<tools>weather(city, day)</tools>" in rendered


ODD_MESSAGES: list[Any] = [
    [],
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": None, "content": 3}],
    [{"role": "user", "content": {"text": None}}],
    [{"role": "user", "content": [None, 4, [], {"text": 5}]}],
    [{"role": "wizard", "content": "x"}],
    [{"role": "developer", "content": "x"}, {"role": "system", "content": "y"}],
    [{"role": "assistant", "content": None, "tool_calls": None}],
    [{"role": "assistant", "content": "x", "tool_calls": [None, {}, {"function": None}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": None}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{bad"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": 4, "arguments": [1]}}]}],
    [{"role": "assistant", "tool_calls": {"function": {}}}],
    [{"role": "assistant", "tool_calls": "x"}],
    [{"role": "tool", "content": None, "tool_call_id": 3}],
    [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n{{ 1/0 }} {% raise %}"}],
]
ODD_TOOLS: list[Any] = [
    None,
    [{}],
    [None, 3, "x"],
    [{"function": None}],
    [{"function": {"name": None}}],
    [{"function": {"name": "f", "parameters": None}}],
    [{"function": {"name": "f", "parameters": {"properties": [1]}}}],
    [{"name": "f", "parameters": {"properties": {"items": {}, "keys": {}}}}],
]


@pytest.mark.parametrize("tools", ODD_TOOLS, ids=repr)
@pytest.mark.parametrize("messages", ODD_MESSAGES, ids=repr)
def test_damaged_chats_are_rendered_not_refused(
    tokenizer: PreTrainedTokenizerFast, messages: Any, tools: Any
) -> None:
    compiled = _compiled(tokenizer.get_chat_template())
    rendered = compiled.render(messages=messages, tools=tools, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n")


def _compiled(template: str) -> Any:
    """The template in the environment that transformers and vLLM use."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def test_tool_markup_survives_decoding_and_turn_ends_do_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = '<tool_call>\n{"name": "é"}\n</tool_call>'
    ids = tokenizer.encode(text + IM_END)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_digit_is_a_token_and_nothing_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode("31415")) == 5
    assert tokenizer.decode(tokenizer.encode("31415 ½ 漢")) == "31415 ½ 漢"


def test_targets_are_exactly_what_the_model_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(2)
    chats = [GENERATOR.conversation(rng, 0.5) for _ in range(40)]
    for chat, row in zip(chats, encode(tokenizer, chats), strict=True):
        written = "".join(s.text for s in render(chat.messages, chat.tools) if s.is_target)
        assert tokenizer.decode(row.ids[row.is_target].tolist()) == written


def test_padding_is_never_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    short = Conversation(({"role": "assistant", "content": "5"},))
    long = Conversation(({"role": "user", "content": "1 " * 50}, *short.messages))
    batch = collate(encode(tokenizer, [short, long]), 0, np.random.default_rng(0))
    assert batch.input_ids.shape[1] % 16 == 0
    assert (batch.targets != 0).all()
    assert batch.num_tokens == int((batch.input_ids != 0).sum())


def test_batches_fit_and_repeat_for_the_same_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    def first_three() -> list[Any]:
        stream = batches(
            GENERATOR,
            tokenizer,
            seed=1,
            batch_tokens=512,
            max_length=300,
            progress=lambda: 0.5,
        )
        return [next(stream) for _ in range(3)]

    for one, two in zip(first_three(), first_three(), strict=True):
        assert one.input_ids.numel() <= 512
        assert torch.equal(one.input_ids, two.input_ids)
        assert torch.equal(one.positions, two.positions)


def small_llama(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "eager"  # the one that returns its weights
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def test_a_fresh_model_binds_words_to_the_name_before_them() -> None:
    """Before any step: the last word finds the words behind the same name, not behind others."""
    torch.manual_seed(0)
    vocabulary = {f"w{i}": i for i in range(400)}
    model = small_llama(400)
    add_induction_heads(model, vocabulary, [f"w{i}" for i in range(50)])
    words = torch.randint(50, 400, (5, 9))
    names = torch.tensor([[7], [21], [33], [44], [33]])
    ids = torch.cat([names, words], dim=1).reshape(1, -1)
    with torch.no_grad():
        attended = model(ids, output_attentions=True).attentions[1][0, 1, -1]
    by_name = attended.reshape(5, 10).sum(dim=1)
    assert by_name[2] + by_name[4] > 0.9
    assert by_name[2] > 0.3


def test_training_leaves_the_noting_of_names_as_it_is() -> None:
    torch.manual_seed(0)
    vocabulary = {f"w{i}": i for i in range(60)}
    model = small_llama(60)
    add_induction_heads(model, vocabulary, ["w1", "w2"])
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    muon = Muon([weight], lr=0.1)
    ids = torch.randint(60, (2, 16))
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        muon.step()
    model(ids)
    assert torch.equal(weight[:64], before[:64])
    assert not torch.allclose(weight[64:], before[64:])


def test_muon_updates_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 24, 40)))
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="2-D"):
        Muon([torch.zeros(3)])


def test_muon_reduces_a_quadratic() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    goal = torch.randn(8, 8)
    optimizer = Muon([weight], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        weight.grad = None
        ((weight - goal) ** 2).sum().backward()
        optimizer.step()
    assert float(((weight - goal) ** 2).mean().detach()) < 0.02


def test_learning_rate_warms_up_then_falls_to_its_final_share() -> None:
    settings = TrainingSettings(shape=TINY, minutes=1, warmup_steps=10, final_lr_share=0.1)
    assert learning_rate_share(0, 0.0, settings) == pytest.approx(0.1)
    assert learning_rate_share(10, 0.0, settings) == pytest.approx(1.0)
    assert learning_rate_share(500, 1.0, settings) == pytest.approx(0.1)


def test_a_run_without_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget"):
        TrainingSettings(shape=TINY)


def test_a_short_run_learns_and_writes_what_serving_needs(tmp_path: Path) -> None:
    class Echo:
        model_id = "nano-echo"

        def conversation(self, rng: random.Random, progress: float) -> Conversation:
            digit = str(rng.randrange(10))
            return Conversation(
                ({"role": "user", "content": digit}, {"role": "assistant", "content": digit})
            )

        def questions(self, rng: random.Random, split: Any, n: int) -> list[Question]:
            return []

    settings = TrainingSettings(
        shape=TINY, tokens=40_000, batch_tokens=1024, warmup_steps=5, max_length=64
    )
    report = train("nano-echo", Echo(), tmp_path / "a", settings)
    assert report.curve[-1]["loss"] < 0.5 * report.curve[0]["loss"]
    again = TrainingSettings(shape=TINY, tokens=2_000, max_length=64, warm_start=tmp_path / "a")
    continued = train("nano-echo", Echo(), tmp_path / "b", again)
    assert continued.earlier is not None
    assert continued.earlier["tokens"] == report.tokens
    assert continued.curve == [] or continued.curve[0]["loss"] < report.curve[0]["loss"]
    assert str(tmp_path) not in (tmp_path / "b" / "training.json").read_text(encoding="utf-8")
    written = {path.name for path in (tmp_path / "b").iterdir()}
    assert written >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "training.json",
        "loss.png",
    }


def question(gold: str, metric: Any, tests: tuple[str, ...] = ()) -> Question:
    return Question("q", gold, metric, "math", "k", "seen", tests)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("12", "The answer is 12.", True),
        ("1250.5", "That makes $1,250.50", True),
        ("-3", "It is \u22123", True),
        ("7.079457844e-07", "The answer is 7.079457844e-07.", True),
        ("12", "The answer is 13.", False),
        ("12", "I do not know.", False),
        ("0", "The answer is 0.", True),
    ],
)
def test_numbers_are_scored_by_value(gold: str, answer: str, right: bool) -> None:
    assert is_right(question(gold, "number"), answer) is right


def test_exact_answers_ignore_case_articles_and_the_final_stop() -> None:
    assert is_right(question("The Nile", "exact"), "the  nile.")
    assert not is_right(question("The Nile", "exact"), "Rhine")


def test_code_is_scored_by_its_assertions() -> None:
    code = "def solution(x):\n    return x + 1"
    assert passes_tests(code, ("assert solution(1) == 2",))
    assert not passes_tests(code, ("assert solution(1) == 3",))
    assert not passes_tests("def solution(x) return", ("assert True",))


def test_an_unknown_model_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'poet'; choose one of math, facts, code"):
        task_module("poet")


def test_the_command_writes_labelled_questions(tmp_path: Path) -> None:
    out = tmp_path / "questions.jsonl"
    command = ["questions", str(out), "--train", "2", "--held-out", "1", "--name", "math"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_command_refuses_a_model_that_is_none(command: str) -> None:
    refused = CliRunner().invoke(app, [command, "poetry"])
    assert (refused.exit_code, "no nano model 'poetry'" in refused.output) == (2, True)
