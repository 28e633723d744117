"""The query encoder against default sentence-transformers, interleaved in one process.

`python -m benchmarks.encoder` prints one JSON object: milliseconds per short query one at a time,
the lowest cosine between the two, and texts per second of the micro-batcher at 1 and 16 callers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.client import question
from serve_app.config import EmbedderConfig
from serve_app.embedder import MicroBatcher, TextEncoder, find_model


@dataclass(frozen=True, slots=True)
class EncoderFigures:
    """What was measured; medians."""

    encoder_ms: float
    """One short query through `TextEncoder`, one thread."""
    sentence_transformers_ms: float
    """The same through `SentenceTransformer.encode`, all its defaults."""
    sentence_transformers_1_thread_ms: float
    """The same with torch held to one thread."""
    speedup: float
    """Over its defaults: median of the ratio of neighbouring runs."""
    speedup_1_thread: float
    """Over one thread; on a busy machine the fairer figure, because torch's threads get in each
    other's way."""
    min_cosine: float
    texts_per_s_alone: float
    texts_per_s_at_16: float


def measure_encoder(num_queries: int) -> EncoderFigures:
    """Run both on the same queries, turn by turn."""
    import torch
    from sentence_transformers import SentenceTransformer

    config = EmbedderConfig()
    with tempfile.TemporaryDirectory() as cache:
        encoder = TextEncoder(config, Path(cache))
    reference = SentenceTransformer(str(find_model(config.model)), device="cpu")
    default_threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {"ours": [], "default": [], "one_thread": []}
    cosines = []
    for number in range(num_queries + 10):
        text = question(number)
        began_s = time.perf_counter()
        theirs = reference.encode(text)
        default_s = time.perf_counter() - began_s
        torch.set_num_threads(1)
        began_s = time.perf_counter()
        reference.encode(text)
        one_thread_s = time.perf_counter() - began_s
        torch.set_num_threads(default_threads)
        began_s = time.perf_counter()
        ours = encoder.encode([text])[0]
        ours_s = time.perf_counter() - began_s
        if number < 10:  # warming up
            continue
        for name, value in zip(seconds, (ours_s, default_s, one_thread_s), strict=True):
            seconds[name].append(value)
        cosines.append(float(ours @ theirs / np.linalg.norm(theirs)))
    median_ms = {name: float(np.median(values)) * 1e3 for name, values in seconds.items()}
    return EncoderFigures(
        encoder_ms=median_ms["ours"],
        sentence_transformers_ms=median_ms["default"],
        sentence_transformers_1_thread_ms=median_ms["one_thread"],
        speedup=float(np.median(np.divide(seconds["default"], seconds["ours"]))),
        speedup_1_thread=float(np.median(np.divide(seconds["one_thread"], seconds["ours"]))),
        min_cosine=min(cosines),
        texts_per_s_alone=asyncio.run(_throughput(encoder, config, num_queries, 1)),
        texts_per_s_at_16=asyncio.run(_throughput(encoder, config, 4 * num_queries, 16)),
    )


async def _throughput(
    encoder: TextEncoder, config: EmbedderConfig, num_queries: int, callers: int
) -> float:
    batcher = MicroBatcher(encoder.encode_tokens, max_batch_size=config.max_batch_size)
    numbers = iter(range(num_queries))

    async def ask_on() -> None:
        for number in numbers:
            await batcher.submit(encoder.tokenize(question(number)))

    began_s = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(callers)))
    return num_queries / (time.perf_counter() - began_s)


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-queries", type=int, default=150)
    figures = measure_encoder(parser.parse_args().num_queries)
    sys.stdout.write(json.dumps(asdict(figures)) + "\n")


if __name__ == "__main__":
    main()
