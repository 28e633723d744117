"""How many tokens a conversation takes: by the model's own tokenizer, or at most.

A local model that lies in a folder is counted with its `tokenizer.json`, on a thread, each text
once. Of every other model a token is taken to have one byte at least, until the engine has told
how many tokens such prompts had. What the chat template adds is learned the same way.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from serve_app.config import LocalModelConfig, ModelConfig
from serve_app.content import Message, pictures_of, text_of_content

logger = logging.getLogger(__name__)

MESSAGE_TOKENS = 16
"""What a template adds to a message, until an engine has told; more than those we know."""
_PICTURE_TOKENS = 1024
"""Of a picture, as a rule. The engine has the last word."""
_MAX_COUNTS = 32_768
"""Texts whose tokens are remembered."""
_MAX_TOKENIZERS = 8
"""Tokenizers that are held at once; a large one takes 50 MB."""
_NUM_TOLD = 32
"""Prompts whose tokens the engine told, by model, of which the worst counts."""
_MARGIN = 1.2
"""Room for texts that take more tokens than the worst of those."""
_LEAST_BYTES = 256
"""Of a prompt from which tokens per byte are learned."""


def written(message: Message) -> str:
    """All of a message that takes tokens, pictures left out."""
    text = text_of_content(message.get("content"))
    calls = message.get("tool_calls")
    return text + orjson.dumps(calls).decode() if calls else text


def num_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class TokenCounter:
    """Counts for all models of a pool; one per gateway replica.

    Invariants:
        - No tokenizer runs on the event loop: there is one thread for all of them.
        - A model that cannot be counted with its own tokenizer is counted by bytes.
    """

    def __init__(self) -> None:
        """Know no model yet."""
        self._files: dict[str, Path] = {}
        """By model id."""
        self._tokenizers: OrderedDict[Path, Tokenizer] = OrderedDict()
        self._counts: OrderedDict[tuple[Path, bytes], int] = OrderedDict()
        self._told: dict[str, deque[float]] = {}
        """By model: tokens that a message takes beside its text, or tokens per byte."""
        self._thread = ThreadPoolExecutor(1, "tokens")

    def use(self, models: Iterable[ModelConfig]) -> None:
        """Take over a changed pool."""
        for model in models:
            self._files.pop(model.model_id, None)
            if isinstance(model, LocalModelConfig) and model.model_source.startswith("/"):
                self._files[model.model_id] = Path(model.model_source, "tokenizer.json")

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def at_most(self, messages: Iterable[Message], tools: Sequence[Any] = ()) -> int:
        """Tokens that no tokenizer exceeds, pictures aside; takes microseconds."""
        total = MESSAGE_TOKENS
        for message in messages:
            total += num_bytes(written(message)) + MESSAGE_TOKENS
            total += _PICTURE_TOKENS * len(pictures_of(message.get("content")))
        return total + (len(orjson.dumps(tools)) if tools else 0)

    async def of_messages(self, model_id: str, messages: Sequence[Message]) -> list[int]:
        """Tokens of each message as a model reads it, the template's included."""
        texts = await self.of_texts(model_id, [written(message) for message in messages])
        added = self.per_message(model_id)
        return [
            tokens + added + _PICTURE_TOKENS * len(pictures_of(message.get("content")))
            for tokens, message in zip(texts, messages, strict=True)
        ]

    async def of_texts(self, model_id: str, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        file = self._files.get(model_id)
        if file is None:
            per_byte = self._per_byte(model_id)
            return [round(num_bytes(text) * per_byte + 0.5) for text in texts]
        keys = [_key(file, text) for text in texts]
        known = {key: self._counts[key] for key in keys if key in self._counts}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        try:
            if new:
                loop = asyncio.get_running_loop()
                counted = await loop.run_in_executor(
                    self._thread, self._count, file, list(new.values())
                )
                known |= zip(new, counted, strict=True)
        except Exception as error:  # the library's own, or no such file on this machine
            logger.warning("model %s: counted by bytes: %s", model_id, type(error).__name__)
            self._files.pop(model_id, None)
            self._told.pop(model_id, None)
            return await self.of_texts(model_id, texts)
        self._counts |= known
        while len(self._counts) > _MAX_COUNTS:
            self._counts.popitem(last=False)
        return [known[key] for key in keys]

    def per_message(self, model_id: str) -> int:
        """Tokens that the template adds to a message."""
        if model_id not in self._files or not self._told.get(model_id):
            return MESSAGE_TOKENS
        return int(max(self._told[model_id]) + 0.999)

    def told(self, model_id: str, messages: Sequence[Message], prompt_tokens: int) -> None:
        """Learn from what an engine says that a prompt without tools took.

        Of a model with a tokenizer only from a prompt that was counted before.
        """
        if any(pictures_of(message.get("content")) for message in messages):
            return
        file, texts = self._files.get(model_id), [written(message) for message in messages]
        if file is None:
            size = sum(map(num_bytes, texts))
            if size < _LEAST_BYTES:
                return
            seen = (prompt_tokens - MESSAGE_TOKENS / 2 * len(messages)) / size
        else:
            known = 0
            for text in texts:
                count = self._counts.get(_key(file, text))
                if count is None:
                    return
                known += count
            seen = (prompt_tokens - known) / len(messages)
        self._told.setdefault(model_id, deque(maxlen=_NUM_TOLD)).append(max(0.0, seen))

    def _per_byte(self, model_id: str) -> float:
        told = self._told.get(model_id)
        return min(1.0, max(told) * _MARGIN) if told else 1.0

    def forget(self, model_id: str) -> None:
        """Take bounds again in place of what was learned: an engine found a prompt too long."""
        self._told.pop(model_id, None)

    def _count(self, file: Path, texts: Sequence[str]) -> list[int]:
        tokenizer = self._tokenizers.get(file)
        if tokenizer is None:
            tokenizer = self._tokenizers[file] = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            if len(self._tokenizers) > _MAX_TOKENIZERS:
                self._tokenizers.popitem(last=False)
        counts = []
        for text in texts:
            plain = text.encode("utf-8", "replace").decode()
            (encoding,) = tokenizer.encode_batch_fast([plain], add_special_tokens=False)
            counts.append(len(encoding.ids))
        return counts


def _key(file: Path, text: str) -> tuple[Path, bytes]:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    return file, digest.digest()
