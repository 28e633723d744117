"""The tokenizer of a nano model: byte-level BPE, one token per digit, trained on generated text.

Comes in: rendered conversations. Goes out: a fast tokenizer with the shared chat template, which
never adds a BOS token and ends turns with `<|im_end|>`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.nano.chat_format import IM_END, IM_START, MARKUP_TOKENS, PAD, render
from benchmarks.nano.task import TaskGenerator

CHAT_TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")


def sample_texts(generator: TaskGenerator, seed: int, count: int) -> Iterator[str]:
    """Rendered conversations from every stage of the curriculum."""
    rng = random.Random(seed)
    for index in range(count):
        conversation = generator.conversation(rng, index / count)
        yield "".join(s.text for s in render(conversation.messages, conversation.tools))


def train_tokenizer(
    generator: TaskGenerator,
    vocab_size: int,
    *,
    seed: int,
    num_samples: int = 12_000,
    max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """Train the tokenizer of one model on its generator's conversations.

    A generator may have a `token_split_pattern`: a regular expression whose matches never merge
    with what is around them, which keeps the parts of invented names regular.

    Args:
        generator: Where the text comes from.
        vocab_size: Entries in all: 256 bytes, merges, and the markup tokens.
        seed: Seed of the sampled conversations.
        num_samples: Conversations to learn merges from.
        max_length: Context length written into the tokenizer's config, in tokens.
    """
    markup = [
        AddedToken(token, special=True, normalized=False)
        for token in (PAD, IM_START, IM_END, *MARKUP_TOKENS)
    ]
    backend = Tokenizer(models.BPE())
    pattern: str | None = getattr(generator, "token_split_pattern", None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern is not None else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *split,
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=markup,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    markup_free = (_without_markup(text) for text in sample_texts(generator, seed, num_samples))
    backend.train_from_iterator(markup_free, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=with_visible_markup(backend),
        eos_token=IM_END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE_PATH.read_text(encoding="utf-8"),
    )


def with_visible_markup(backend: Tokenizer) -> Tokenizer:
    """The same with its markup kept in decoded text; the BPE trainer marks it all as special."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in MARKUP_TOKENS
    return Tokenizer.from_str(json.dumps(state))


def _without_markup(text: str) -> str:
    """The text with a line break for every markup token, so that no merge spells part of one."""
    for token in (IM_START, IM_END, *MARKUP_TOKENS):
        text = text.replace(token, "\n")
    return text
