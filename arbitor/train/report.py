"""What a run tells at its start and at its end."""

import math
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from arbitor import __version__
from arbitor.config import ModelConfig, RunConfig
from arbitor.evaluate import Evaluation
from arbitor.ternary import (
    Int8Embedding,
    TernaryEmbeddingTable,
    TernaryExperts,
    TernaryScaleTensor,
    named_ternary,
)
from arbitor.ternary.audit import audit
from arbitor.train.device import backend
from arbitor.train.display import format_bytes, format_seconds, printable
from arbitor.train.learnt import try_command
from arbitor.train.loop import Trainer
from arbitor.train.metrics import FIGURES, HELD_OUT
from arbitor.train.recorded import why_not_recorded
from arbitor.train.task import TextTask

EMBEDDED_PROMPT = b"def "
PROMPT_BYTES = 32
SAMPLE_BYTES = 400


def show_start(console: Console, trainer: Trainer, run: Path) -> None:
    """Print what is about to be trained, on what, and what it keeps."""
    config, device = trainer.config, trainer.device
    train, ctx = config.train, config.model.ctx
    trunk = sum(m.numel() for _, m in named_ternary(trainer.model) if isinstance(m, TernaryScaleTensor))
    tables = sum(m.numel() for _, m in named_ternary(trainer.model) if isinstance(m, Int8Embedding))
    report = audit(trainer.model, trainer.optimizer)
    is_text = trainer.task.unit == "bytes"
    items = f"{train.batch} x {ctx} bytes" if is_text else f"{train.batch} {trainer.task.unit}"
    micro_batches = items + (f" x {train.accum}" if train.accum > 1 else "")
    total = train.steps * trainer.bytes_per_step
    threads = "" if device.is_cuda else f", {torch.get_num_threads()} threads"
    rows = {
        "run": f"{run}  (arbitor {__version__}, torch {torch.__version__})",
        "device": f"{device.name}{threads}: {device.reason}",
        "back end": backend(device.device),
        **({"steps": how_steps_run(trainer)} if device.is_cuda else {}),
        "model": f"{config.preset}: {trunk:,} ternary weights, {tables:,} int8 table weights, "
        f"context {ctx} bytes",
        **({"parts": parts} if (parts := describe_parts(config.model)) else {}),
        "state": f"{train.state}: {report.bytes_per_weight:.2f} bytes a weight, "
        f"{format_bytes(trainer.optimizer.state_bytes())} in all; rule {train.rule}, lr {trainer.peak_lr:g}",
        "memory": f"state + about {format_bytes(captured_bytes(trainer))} of captured gradients at batch "
        f"{micro_batches}, and activations",
        "data": trainer.task.description,
        "training": f"{train.steps:,} steps of {micro_batches}: {format_bytes(total)}",
    }
    print_rows(console, rows)
    if trainer.step:
        console.print(Text(f"going on after step {trainer.step} of {train.steps}"))
    console.print()


def how_steps_run(trainer: Trainer) -> str:
    """Whether steps on a GPU are replayed, and if not, why."""
    why_not = why_not_recorded(trainer.model)
    if why_not is None and not trainer.task.fixed_shapes:
        why_not = "not every batch has the same shape"
    if why_not is not None:
        return f"kernels are launched one by one: {why_not}"
    return getattr(trainer.task, "how_replayed", "replayed as one CUDA graph")


def describe_parts(model: ModelConfig) -> str:
    """The parts beside attention and feed-forward, in words; empty without any."""
    parts = []
    if model.codebook_rows:
        parts.append(f"{model.codebook_rows:,} learned motifs")
    elif model.motif_trits:
        parts.append(f"3^{model.motif_trits} motifs")
    if model.memory_rows:
        tables = f"{2 * model.memory_heads} tables of {model.memory_rows:,} rows"
        place = " on the host" if model.memory_host else ""
        parts.append(f"memory over {model.memory_over}: {tables}{place}")
    if model.num_experts:
        parts.append(f"{model.num_experts} experts, {model.num_active_experts} active and one shared")
    elif model.core_ffn_dim:
        parts.append("one feed-forward part in the core")
    if model.graph_edges:
        parts.append(f"graph of {model.graph_edges:,} edges")
    if model.has_core:
        plural = "iteration" if model.max_moe_iters == 1 else "iterations"
        parts.append(f"at most {model.max_moe_iters} {plural}")
    if model.output_router:
        parts.append("output router")
    if model.audio_rate:
        bits = model.audio_codes * model.audio_trits * math.log2(3) * 50
        parts.append(
            f"sounds of {model.audio_rate:,} Hz in 50 x {model.audio_codes} codes ({bits:,.0f} bits) a second"
        )
    if model.video_size:
        side, times = model.video_size // model.video_patch, model.video_frames // model.video_stride
        kind = " of a frozen autoencoder" if model.video_autoencoder else ""
        parts.append(
            f"clips of {model.video_frames} frames of {model.video_size} x {model.video_size} in "
            f"{times} x {side} x {side} latents{kind}"
        )
    if model.image_size:
        side, patch = model.image_size, model.image_patch
        colour = "grey" if model.image_channels == 1 else "colour"
        frozen = ", behind a frozen encoder" if model.image_encoder else ""
        parts.append(f"{colour} images of {side} x {side} in {(side // patch) ** 2} patches{frozen}")
    return "; ".join(parts)


def captured_bytes(trainer: Trainer) -> int:
    """Estimate of what backward leaves for the optimizer: of each gradient the smaller of its two forms.

    Positions are taken to stay in the core for all iterations that are allowed.
    """
    train, model = trainer.config.train, trainer.config.model
    tokens = train.batch * trainer.task.positions_per_item * train.accum
    size = 2 if trainer.device.is_cuda else 4  # bf16 under autocast, fp32 on the CPU
    total = 0
    for name, module in named_ternary(trainer.model):
        uses = tokens * model.max_moe_iters if name.startswith("core.") else tokens
        if isinstance(module, TernaryEmbeddingTable) and module.sparse:
            total += uses * 2 * model.memory_heads * (8 + 4 * module.in_features)
        elif isinstance(module, TernaryScaleTensor):
            rows = uses * model.num_active_experts if isinstance(module, TernaryExperts) else uses
            pairs = rows * (module.in_features + size * module.out_features)
            total += min(pairs, size * module.numel())
        else:
            total += size * sum(p.numel() for p in module.parameters() if p.dim() == 2)
    return total


def sample_of(trainer: Trainer) -> tuple[bytes, bytes]:
    """A prompt and what the model makes of it: code for the embedded corpus, else the beginning of the
    held-out data; of media, no prompt and the captions of the first ones held out.
    """
    task = trainer.task
    if not isinstance(task, TextTask):
        return b"", task.show(trainer.model).encode()
    prompt = EMBEDDED_PROMPT
    if trainer.config.data.data:
        prompt = task.corpus.held_out.as_array(PROMPT_BYTES).tobytes()
    return prompt, trainer.model.generate(prompt, SAMPLE_BYTES, seed=trainer.config.train.seed)


def summarise(trainer: Trainer, result: Evaluation, seconds: float) -> dict[str, Any]:
    """Content of `summary.json`, with the evaluation at the end."""
    report = audit(trainer.model, trainer.optimizer)
    right, figure = result.captions_right, trainer.task.figure
    return {
        **({} if figure == "bits_per_byte" else {"figure": figure}),
        HELD_OUT + figure: result.bits_per_byte,
        "held_out_bytes": result.num_bytes,
        "held_out_whole": result.num_bytes == trainer.task.held_out_bytes,
        **({} if right is None else {"captions_right": right}),
        **result.extra,
        f"best_{figure}": None if trainer.best is None else trainer.best["bits_per_byte"],
        "best_step": None if trainer.best is None else trainer.best["step"],
        "bytes_per_weight": report.bytes_per_weight,
        "trunk_bytes_per_weight": report.trunk_bytes_per_weight,
        "trit_weights": report.trit_weights,
        "state_bytes": trainer.optimizer.state_bytes(),
        "dropped_steps": trainer.optimizer.dropped_steps,
        "seconds": round(seconds, 3),
        "steps": trainer.step,
        "bytes_seen": trainer.step * trainer.bytes_per_step,
        "device": trainer.device.name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "version": __version__,
    }


def show_end(
    console: Console,
    config: RunConfig,
    run: Path,
    summary: Mapping[str, Any],
    prompt: bytes,
    sample: bytes,
    more: Mapping[str, str],
    *,
    show_next: bool = True,
) -> None:
    """Print the result, the sample and, with `show_next`, what to do with it; `more` are the task's rows."""
    measured = format_bytes(summary["held_out_bytes"])
    where = f"the {measured} held out" if summary["held_out_whole"] else f"{measured} of what is held out"
    right, figure = summary.get("captions_right"), summary.get("figure", "bits_per_byte")
    rows = {
        **({} if right is None else {"captions": f"{100 * right:.2f} % of the held-out ones written right"}),
        "held out": f"{summary[HELD_OUT + figure]:.4f} {FIGURES[figure]} (on {where})",
        **more,
        "state": f"{summary['bytes_per_weight']:.2f} bytes a weight, {format_bytes(summary['state_bytes'])}; "
        "no float weight, no float training state",
        "time": f"{format_seconds(summary['seconds'])}, {format_bytes(summary['bytes_seen'])} seen",
        "run": f"{run}: metrics.jsonl, loss.png, sample.txt, summary.json"
        + (", samples/" if (run / "samples").is_dir() else "")
        + (", latest/ best/ final/" if config.train.save else " (no checkpoints: --no-save)"),
    }
    console.print()
    print_rows(console, rows)
    is_text = not (
        config.model.image_size or config.model.audio_rate or config.model.video_size or config.mix.active
    )
    title = f"sample after {_as_text(prompt)!r}" if is_text else "of the first held-out ones"
    if is_text or sample:
        console.print(Text(f"\n{title}:", style="bold"))
        text = Text(_as_text(prompt), style="bold").append(_as_text(sample), style="not bold")
        console.print(text, soft_wrap=True)
    if config.train.save and show_next:
        command = _next_command(run, config, prompt)
        console.print(Text(f"\nnext: {command}"), soft_wrap=True)


def resume_command(run: Path) -> str:
    """A command line that goes on with the run, whatever other runs there will be."""
    return f"arbitor train --resume --run {shlex.quote(run.name)}"


def _next_command(run: Path, config: RunConfig, prompt: bytes) -> str:
    """A command line that tries the run just made."""
    command = try_command(run.name, config.learns)
    text = prompt_text(prompt)
    with_prompt = bool(text.strip()) and config.learns == ("text",) and not config.mix.active
    return f"{command} --prompt {shlex.quote(text)}" if with_prompt else command


def prompt_text(prompt: bytes) -> str:
    """What can be typed of a prompt's first line: up to the first byte that belongs to no printable text."""
    line = _as_text(prompt.lstrip(b"\r\n")).partition("\n")[0]
    return line.partition("\N{REPLACEMENT CHARACTER}")[0]


def _as_text(data: bytes) -> str:
    return printable(data.decode("utf-8", errors="replace"))


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Print labels and texts in two columns, wrapped to a terminal's width, in whole lines elsewhere."""
    indent = max(map(len, rows)) + 2
    width = max(console.width, indent + 20) if console.is_terminal else 10_000
    for label, text in rows.items():
        lines = textwrap.wrap(text, width - indent, break_on_hyphens=False) or [""]
        body = ("\n" + " " * indent).join(lines)
        console.print(Text(label.ljust(indent), style="bold").append(body, style="not bold"), soft_wrap=True)
