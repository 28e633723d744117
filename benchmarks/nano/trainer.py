"""Trains one nano model from scratch on a CPU and writes a folder that vLLM serves unchanged.

Comes in: a `TaskGenerator`. Goes out: bf16 safetensors, config, tokenizer with the chat template,
`training.json` (settings, seed, tokens, loss curve) and `loss.png`.

To plug a generator in: `benchmarks/nano/<name>_tasks.py` exposes `GENERATOR` (a `TaskGenerator`)
and `EVAL_CELLS` (a tuple of `EvalCell`); `registry.SHAPES` and `registry.TOKENS` hold its size and
budget. Then `python -m benchmarks.nano train <name>` trains it. `conversation(rng, progress)`
returns messages with string content in OpenAI form; a drill of several user and assistant turns in
one conversation trains more targets per token.

The learning rate follows the share of the budget used (wall clock or tokens, whichever is further),
so a shared CPU cannot break the schedule; only a token budget makes the run itself repeatable.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.nano.batching import Batch, batches, token_id
from benchmarks.nano.chat_format import GENERATION_PROMPT, IM_END, PAD, render, tool_schemas
from benchmarks.nano.induction_init import add_induction_heads
from benchmarks.nano.muon import Muon
from benchmarks.nano.registry import ModelShape
from benchmarks.nano.task import TaskGenerator
from benchmarks.nano.tokenizer import CHAT_TEMPLATE_PATH, train_tokenizer

logger = logging.getLogger(__name__)

REPORT_NAME = "training.json"
_HEAD_SIZE = 32
_LOG_EVERY_STEPS = 10


@dataclass(frozen=True)
class TrainingSettings:
    """How one model is trained. At least one of `minutes` and `tokens` is set."""

    shape: ModelShape
    minutes: float | None = None
    """Wall-clock budget; `None` = no limit."""
    tokens: int | None = None
    """Token budget without padding; `None` = no limit."""
    seed: int = 0
    batch_tokens: int = 4096
    max_length: int = 640
    """Longest conversation trained on, in tokens."""
    context_length: int = 4096
    """Longest prompt plus answer that is served, in tokens; beyond `max_length` it is untrained."""
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup_steps: int = 60
    final_lr_share: float = 0.02
    clip_norm: float = 1.0
    compile_model: bool = False
    checkpoint_minutes: float | None = None
    """Wall-clock time between checkpoints, in the folder `checkpoint` of the run; `None` = none."""
    warm_start: Path | None = None
    """Folder of an earlier run to continue from, with its tokenizer."""

    def __post_init__(self) -> None:
        if self.minutes is None and self.tokens is None:
            raise ValueError("training needs a budget: set minutes, tokens or both")


@dataclass
class TrainingReport:
    """What a run did; saved as `training.json`."""

    model_id: str
    settings: dict[str, Any]
    num_parameters: int
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    """Points with `step`, `tokens`, `loss`, `accuracy`; means over the steps since the last."""
    earlier: dict[str, Any] | None = None
    """The report of the run that this one continued; `None` = started from random weights."""


def train(
    model_id: str, generator: TaskGenerator, out_dir: Path, settings: TrainingSettings
) -> TrainingReport:
    """Train a model and write it to `out_dir`.

    Args:
        model_id: For example `nano-math`; goes into the report.
        generator: Source of training conversations.
        out_dir: Folder to write; created if missing, and overwritten at the end of the run.
        settings: Size, budget and optimiser settings.
    """
    torch.manual_seed(settings.seed)
    tokenizer = _tokenizer(generator, settings)
    assert_rendering_matches(generator, tokenizer, seed=settings.seed)
    name_tokens: tuple[str, ...] = getattr(generator, "name_tokens", ())
    model = build_model(tokenizer, settings, name_tokens)
    report = TrainingReport(
        model_id=model_id,
        settings=json.loads(json.dumps(asdict(replace(settings, warm_start=None)))),
        num_parameters=sum(p.numel() for p in model.parameters()),
        earlier=_earlier_report(settings),
    )
    logger.info("training %s: %d parameters", model_id, report.num_parameters)
    with _progress_bar() as bar:
        _fit(model, tokenizer, generator, settings, report, bar, out_dir)
    _save(model, tokenizer, report, out_dir)
    return report


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    settings: TrainingSettings,
    name_tokens: Sequence[str] = (),
) -> LlamaForCausalLM:
    """A Llama of the configured shape, fresh or continued from `settings.warm_start`.

    Args:
        tokenizer: The model's tokenizer.
        settings: Size, and what to continue from.
        name_tokens: Tokens that tell names apart, for `add_induction_heads`.
    """
    if settings.warm_start is not None:
        warm: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
            settings.warm_start, dtype=torch.float32
        )
        return warm
    shape = settings.shape
    num_heads = shape.hidden_size // _HEAD_SIZE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=_HEAD_SIZE,
        max_position_embeddings=settings.context_length,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, IM_END),
        pad_token_id=token_id(tokenizer, PAD),
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    if shape.induction_init:
        add_induction_heads(model, tokenizer.get_vocab(), name_tokens)
    return model


def assert_rendering_matches(
    generator: TaskGenerator,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    num_samples: int = 200,
) -> None:
    """Check that serving will show the model exactly what training shows it.

    Raises:
        ValueError: If the chat template renders a sample differently from `render`, or if the
            prompt of a sample is not a token prefix of the whole conversation.
    """
    rng = Random(seed)
    for index in range(num_samples):
        conversation = generator.conversation(rng, index / num_samples)
        messages = list(conversation.messages)
        tools: list[Any] | None = tool_schemas(conversation.tools) or None
        expected = "".join(s.text for s in render(messages, conversation.tools))
        served = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        if served != expected:
            raise ValueError(f"the chat template renders {served!r}, training {expected!r}")
        prompt = str(
            tokenizer.apply_chat_template(
                messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True
            )
        )
        if not prompt.endswith(GENERATION_PROMPT):
            raise ValueError(f"prompt ends without the generation prompt: {prompt!r}")
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        whole_ids = tokenizer.encode(expected, add_special_tokens=False)
        if whole_ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(f"the prompt's tokens change when the answer follows: {expected!r}")


def _tokenizer(generator: TaskGenerator, settings: TrainingSettings) -> PreTrainedTokenizerFast:
    if settings.warm_start is not None:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            settings.warm_start
        )
        tokenizer.chat_template = CHAT_TEMPLATE_PATH.read_text(encoding="utf-8")
        return tokenizer
    return train_tokenizer(
        generator,
        settings.shape.vocab_size,
        seed=settings.seed + 1,
        max_length=settings.context_length,
    )


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        refresh_per_second=0.5,
    )


def _fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    generator: TaskGenerator,
    settings: TrainingSettings,
    report: TrainingReport,
    bar: Progress,
    out_dir: Path,
) -> None:
    """The training loop: fills `report` and changes `model` in place."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    hidden_ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in hidden_ids]
    muon = Muon(hidden, lr=settings.muon_lr)
    adamw = torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    loss_of = _loss_function(model, compiled=settings.compile_model)
    started = kept_s = time.monotonic()

    def progress() -> float:
        by_time = (time.monotonic() - started) / (60 * settings.minutes) if settings.minutes else 0
        by_tokens = report.tokens / settings.tokens if settings.tokens else 0
        return min(1.0, max(by_time, by_tokens))

    task = bar.add_task(report.model_id, total=1.0)
    sums = torch.zeros(3, dtype=torch.float64)
    stream = batches(
        generator,
        tokenizer,
        seed=settings.seed + 2,
        batch_tokens=settings.batch_tokens,
        max_length=settings.max_length,
        # A continued run is past the drills of the beginning.
        progress=progress if settings.warm_start is None else lambda: 1.0,
    )
    while (now := progress()) < 1.0:
        batch = next(stream)
        scale = learning_rate_share(report.steps, now, settings)
        muon.lr = settings.muon_lr * scale
        adamw.param_groups[0]["lr"] = settings.adamw_lr * scale
        loss, statistics = loss_of(batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        muon.step()
        adamw.step()
        model.zero_grad(set_to_none=True)
        sums += statistics
        report.steps += 1
        report.tokens += batch.num_tokens
        if report.steps % _LOG_EVERY_STEPS == 0:
            _log_point(report, sums, bar, task, now)
            sums.zero_()
        report.seconds = time.monotonic() - started
        if settings.checkpoint_minutes and time.monotonic() - kept_s > (
            60 * settings.checkpoint_minutes
        ):
            _save(copy.deepcopy(model), tokenizer, report, out_dir / "checkpoint")
            kept_s = time.monotonic()


def learning_rate_share(step: int, progress: float, settings: TrainingSettings) -> float:
    """Share of the peak learning rate: linear warm-up in steps, then a cosine in budget used."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return warmup * (settings.final_lr_share + (1 - settings.final_lr_share) * cosine)


def _loss_function(
    model: LlamaForCausalLM, *, compiled: bool
) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """Weighted next-token loss; also (loss sum, right count, count) over the model's own tokens."""

    def forward(input_ids: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = hidden.flatten(0, 1)[positions] @ model.model.embed_tokens.weight.T
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return losses, logits.argmax(dim=-1) == targets

    run = torch.compile(forward, dynamic=True) if compiled else forward

    def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
        losses, right = run(batch.input_ids, batch.positions, batch.targets)
        own = batch.weights == 1.0
        statistics = torch.stack([losses.detach()[own].sum(), right[own].sum(), own.sum()])
        return (losses * batch.weights).sum() / batch.weights.sum(), statistics.double()

    return loss_of


def _log_point(report: TrainingReport, sums: Tensor, bar: Progress, task: Any, now: float) -> None:
    loss, right, count = sums.tolist()
    point = {
        "step": report.steps,
        "tokens": report.tokens,
        "loss": round(loss / max(1.0, count), 4),
        "accuracy": round(right / max(1.0, count), 4),
    }
    report.curve.append(point)
    millions = f"{report.tokens / 1e6:.2f}M tokens"
    summary = f"loss {point['loss']:.3f} acc {point['accuracy']:.3f} {millions}"
    bar.update(task, completed=now, description=f"{report.model_id} {summary}")
    if report.steps % (5 * _LOG_EVERY_STEPS) == 0:
        logger.info("%s %3.0f%% step %d %s", report.model_id, 100 * now, report.steps, summary)


def _save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    report: TrainingReport,
    out_dir: Path,
) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.bfloat16().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    write_report(report, out_dir)
    for path in out_dir.iterdir():
        path.chmod(0o644)
    totals = (report.steps, report.tokens, out_dir)
    logger.info("%s: %d steps, %d tokens -> %s", report.model_id, *totals)


def write_report(report: TrainingReport, out_dir: Path) -> None:
    """Write `training.json` and the figure `loss.png`."""
    text = json.dumps(asdict(report), indent=1) + "\n"
    (out_dir / REPORT_NAME).write_text(text, encoding="utf-8")
    _plot(report, out_dir / "loss.png")


def _earlier_report(settings: TrainingSettings) -> dict[str, Any] | None:
    if settings.warm_start is None or not (settings.warm_start / REPORT_NAME).exists():
        return None
    text = (settings.warm_start / REPORT_NAME).read_text(encoding="utf-8")
    report: dict[str, Any] = json.loads(text)
    return report


def _plot(report: TrainingReport, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    runs = [asdict(report)]
    while runs[0].get("earlier"):
        runs.insert(0, runs[0]["earlier"])
    start = 0
    for run in runs:
        tokens = [(start + point["tokens"]) / 1e6 for point in run["curve"]]
        axes.plot(tokens, [point["loss"] for point in run["curve"]], linewidth=1)
        start += run["tokens"]
    axes.set(
        xlabel="training tokens (millions)",
        ylabel="loss on the model's own tokens",
        title=f"{report.model_id}: {report.num_parameters / 1e6:.2f}M parameters",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
