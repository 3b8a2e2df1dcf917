"""`arbitor finetune` from its settings to its exit code: find or make the run, learn, tell how it ended."""

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from arbitor import __version__
from arbitor.chat import Chat
from arbitor.config import dump_toml
from arbitor.data.images import Geometry
from arbitor.errors import UserError
from arbitor.finetune.adapter import find_adapter
from arbitor.finetune.config import CONFIG_FILE, FinetuneConfig, load_finetune
from arbitor.finetune.data import Instructions, open_captions, open_instructions
from arbitor.finetune.instructions import prefix_of
from arbitor.finetune.loop import MAX_DROPPED_IN_A_ROW, Finetune
from arbitor.finetune.lora import fingerprint
from arbitor.finetune.methods import AdapterMethod, VoteMethod, adapter_of, verified_state
from arbitor.flags import flag_of
from arbitor.generate import greedy_texts
from arbitor.model import ARBModel
from arbitor.model.vocab import NUM_BYTES
from arbitor.train import runs, swap
from arbitor.train.checkpoint import Checkpoint, load_checkpoint
from arbitor.train.device import Device, deterministic, resolve_device, thread_count
from arbitor.train.display import Display, format_bytes, format_seconds, printable
from arbitor.train.metrics import MetricsLog
from arbitor.train.plot import plot_loss
from arbitor.train.report import print_rows
from arbitor.train.signals import Interrupted, SignalGuard, unwinding
from arbitor.train.tensorfile import DamagedError

FAILED = 1
NUM_SAMPLES = 3
SAMPLE_BYTES = 80


def start_finetuning(
    settings: Mapping[str, Any],
    *,
    checkpoint: str | None = None,
    run: str | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> int:
    """Finetune a checkpoint, new or resumed, to the end or to a signal.

    Args:
        settings: fields of `FinetuneConfig` that were given by name.
        checkpoint: the base: a run, checkpoint or its file; None is the newest run's best.
        run: name of the finetune; None makes the next `<base>-lora-<number>` or `<base>-full-<number>`, or
            resumes the newest.
        resume: go on with an existing finetune and its own settings.
        console: where progress goes; None is stdout.

    Returns:
        Exit code: 0 finished, 1 too many steps dropped in a row, 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: anything given that cannot be used; nothing was changed then.
    """
    console = console or Console(highlight=False)
    if resume:
        folder = _existing(run)
        config = load_finetune(folder)
        _refuse_contradiction(folder, config, settings, checkpoint)
        if runs.is_finished(folder):
            console.print(f"the finetune {folder.name!r} is finished; nothing to do", markup=False)
            return 0
        device = resolve_device(settings.get("device", config.device))
        base, model = _load_base(config.base, device)
        if fingerprint(model) != config.base_fingerprint:
            raise UserError(
                f"{config.base} is not the checkpoint that {folder.name!r} was started from; put that back, "
                "or start a new finetune"
            )
        data = _open(config, model)
        with contextlib.closing(MetricsLog(folder)) as log:
            return _run(config, base, model, data, device, folder, log, console, resume=True)
    if run is not None and runs.run_path(run).exists():
        raise UserError(f"the run {run!r} exists: go on with --resume, or choose another --run")
    if (adapter := None if checkpoint is None else find_adapter(checkpoint)) is not None:
        raise UserError(
            f"{adapter} is an adapter; a finetune starts from a base: give the run or checkpoint of one"
        )
    folder_of_base = _base_of_newest() if checkpoint is None else runs.find_checkpoint(checkpoint)
    device = resolve_device(settings.get("device", "auto"))
    base, model = _load_base(str(folder_of_base), device)
    config = FinetuneConfig(base=str(folder_of_base), base_fingerprint=fingerprint(model), **settings)
    _refuse_idle_settings(config, settings)
    data = _open(config, model)
    if not config.full:
        adapter_of(model, config)  # what it cannot be made of is told before a folder is made
    with unwinding():
        folder = runs.make_run(f"{_base_name(folder_of_base)}-{'full' if config.full else 'lora'}", run)
        try:
            with contextlib.closing(MetricsLog(folder)) as log:
                swap.write_file(folder / CONFIG_FILE, config.dump())
                return _run(config, base, model, data, device, folder, log, console, resume=False)
        except BaseException:
            runs.remove_if_untrained(folder)  # what never took a step shall not keep the name
            raise


def _open(config: FinetuneConfig, model: ARBModel) -> Instructions:
    """The data that the settings name."""
    ctx = _ctx(config, model)
    if not config.vision:
        return open_instructions(config.data, config.held_out, ctx)
    if not model.config.image_size:
        raise UserError(
            f"--enable-vision: the base {config.base} takes no images; `arbitor train --resume "
            "--enable-vision` lets a run grow into one that does"
        )
    geometry = Geometry(size=model.config.image_size, channels=model.config.image_channels)
    return open_captions(config.data, config.held_out, ctx, geometry)


def list_finetunes() -> list[Path]:
    """All finetunes under ./runs, newest first."""
    if not runs.RUNS.is_dir():
        return []
    found = [path for path in runs.RUNS.iterdir() if (path / CONFIG_FILE).is_file()]
    return sorted(found, key=lambda path: _made(path / CONFIG_FILE), reverse=True)


def newest_adapter() -> Path | None:
    """The adapter of the newest finetune; None if a run is newer, it voted on trits, or there is none."""
    finetunes, newest_run = list_finetunes(), next(iter(runs.list_runs()), None)
    if not finetunes:
        return None
    if newest_run is not None and _made(newest_run / runs.CONFIG_FILE) >= _made(finetunes[0] / CONFIG_FILE):
        return None
    return find_adapter(finetunes[0])


def _made(path: Path) -> int:
    return path.stat().st_mtime_ns


def _run(
    config: FinetuneConfig,
    base: Checkpoint,
    model: ARBModel,
    data: Instructions,
    device: Device,
    folder: Path,
    log: MetricsLog,
    console: Console,
    *,
    resume: bool,
) -> int:
    source = _checkpoint_to_resume(folder) if resume else None
    state = None if source is None else verified_state(source)
    log.cut_after(-1 if state is None else int(state["step"]))
    threads = torch.get_num_threads() if state is None else int(state["threads"])
    with (
        thread_count(threads),
        deterministic(config.seed, device.device),
        SignalGuard() as guard,
        Display(console, config.steps) as display,
    ):
        method: AdapterMethod | VoteMethod
        if config.full:
            method = VoteMethod(model, config, base)
            # With it, the folder is a run like any other: `arbitor generate`, `eval` and `audit` take it.
            swap.write_file(folder / runs.CONFIG_FILE, dump_toml(method.run_config))
        else:
            method = AdapterMethod(model, config)
        finetune = Finetune(config, model, method, data, device, folder, log, display, guard)
        if source is not None:
            finetune.restore(source)
        method.set_training(True)
        _show_start(console, finetune, base)
        outcome = finetune.run_steps()
        samples = None
        if outcome.finished:
            with contextlib.suppress(Interrupted), finetune.undisturbed():
                samples = _samples(model, data)
    if not config.full and fingerprint(model) != config.base_fingerprint:
        raise RuntimeError("the base's weights changed during a finetune of adapters")
    plot_loss(log.path, folder / "loss.png", f"{folder.name}: answers")
    if samples is None:
        return _stopped(finetune, outcome.diverged, console, guard)
    finetune.save("final")
    summary = _summary(finetune)
    swap.write_file(folder / "sample.txt", samples)
    # Last of all: a run with a summary counts as finished.
    swap.write_file(folder / runs.SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    _show_end(console, finetune, summary, samples)
    return 0


def _load_base(path: str, device: Device) -> tuple[Checkpoint, ARBModel]:
    base = load_checkpoint(runs.find_checkpoint(path))
    return base, base.build_model(device.device).eval()


def _base_of_newest() -> Path:
    """The newest run's checkpoint; finetunes with `--full` are runs too, but no base unless named."""
    for run in runs.list_runs():
        if not (run / CONFIG_FILE).is_file():
            with contextlib.suppress(UserError):
                return runs.find_checkpoint(run)
    return runs.find_checkpoint(None)


def _base_name(checkpoint: Path) -> str:
    folder = checkpoint.resolve()
    name = folder.name.removeprefix(".").removesuffix(".previous")
    return folder.parent.name if name in runs.CHECKPOINTS else name


def _existing(run: str | None) -> Path:
    """The finetune of that name; without a name the newest."""
    found = list_finetunes()
    if run is None:
        if not found:
            raise UserError(f"there is no finetune under ./{runs.RUNS}; `arbitor finetune` makes one")
        return found[0]
    path = runs.run_path(run)
    if path not in found:
        names = ", ".join(folder.name for folder in found[:5])
        raise UserError(
            f"there is no finetune {run!r} under ./{runs.RUNS}" + (f"; there are {names}" if names else "")
        )
    return path


def _refuse_contradiction(
    folder: Path, config: FinetuneConfig, settings: Mapping[str, Any], checkpoint: str | None
) -> None:
    where = f"{folder / CONFIG_FILE}; leave it out to resume, or start a new finetune"
    if checkpoint is not None and str(runs.find_checkpoint(checkpoint)) != config.base:
        raise UserError(f"{checkpoint} is not the base {config.base} in {where}")
    for name, value in settings.items():
        own = getattr(config, name)
        given = tuple(value) if isinstance(value, list) else value
        if given != own and name != "device":
            raise UserError(f"{flag_of(name)} {value} contradicts {name} = {own} in {where}")


def _refuse_idle_settings(config: FinetuneConfig, settings: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that the chosen way of learning does not have."""
    idle = ("rank", "alpha", "dropout", "targets") if config.full else ("state",)
    for name in idle:
        if name in settings:
            why = "--full trains the trits, without an adapter" if config.full else "it belongs to --full"
            raise UserError(f"--{name} has no effect: {why}; leave it out")


def _ctx(config: FinetuneConfig, model: ARBModel) -> int:
    if config.ctx is not None and config.ctx > model.config.ctx:
        raise UserError(
            f"--ctx is {config.ctx}, the base was trained with {model.config.ctx}; give that or less"
        )
    return model.config.ctx if config.ctx is None else config.ctx


def _checkpoint_to_resume(folder: Path) -> Path | None:
    """`latest`, or the one before it if that is damaged; None if the run was stopped before its first."""
    latest = folder / "latest"
    for name in runs.CHECKPOINTS:
        swap.recover(folder / name, keep_previous=name == "latest")
    if not latest.is_dir():
        return None
    try:
        verified_state(latest)
    except DamagedError as error:
        if not swap.previous_of(latest).is_dir():
            raise UserError(f"cannot resume: {error}; start a new finetune") from error
        verified_state(swap.previous_of(latest))
        swap.restore_previous(latest)
    return latest


def _show_start(console: Console, finetune: Finetune, base: Checkpoint) -> None:
    config, method, device = finetune.config, finetune.method, finetune.device
    if isinstance(method, AdapterMethod):
        adapter = method.adapter
        learns = (
            f"float adapters of rank {adapter.rank} beside {len(adapter.modules)} linears: "
            f"{method.num_weights:,} weights, AdamW; the base's integers are frozen"
        )
    else:
        assert isinstance(method, VoteMethod)
        start = "going on from the base's accumulators" if method.continued else "accumulators start at zero"
        size = format_bytes(method.optimizer.state_bytes())
        learns = f"the trits by votes, state {config.state} ({size}), {start}"
    threads = "" if device.is_cuda else f", {torch.get_num_threads()} threads"
    rows = {
        "run": f"{finetune.folder}  (arbitor {__version__}, torch {torch.__version__})",
        "device": f"{device.name}{threads}: {device.reason}",
        "base": f"{base.folder}, context {finetune.model.config.ctx} bytes",
        "learns": f"{learns}; lr {method.peak_lr:g}",
        "data": finetune.data.description,
        "steps": f"{config.steps:,} of {config.batch} {finetune.data.unit}",
    }
    print_rows(console, rows)
    if finetune.step:
        console.print(Text(f"going on after step {finetune.step} of {config.steps}"))
    console.print()


def _samples(model: ARBModel, data: Instructions) -> str:
    """Some held-out prompts with what the model answers and what it should have."""
    if pictured := [example for example in data.held_out[:NUM_SAMPLES] if example.pixels is not None]:
        prefix = prefix_of(model, pictured)
        assert prefix is not None
        texts = greedy_texts(model, prefix, SAMPLE_BYTES)
        wanted = [bytes(e.ids[e.is_answer & (e.ids < NUM_BYTES)].tolist()) for e in pictured]
        pairs = [
            (text.decode("utf-8", "replace"), right.decode("utf-8", "replace"))
            for text, right in zip(texts, wanted, strict=True)
        ]
        return "".join(f"model: {text}\nright: {right}\n\n" for text, right in pairs)
    lines = []
    for messages, answer in data.prompts[:NUM_SAMPLES]:
        chat = Chat(model, temperature=0, max_bytes=SAMPLE_BYTES)
        drawn = b"".join(chat.answer(messages))
        for title, text in (("user", messages[-1].content), ("model", drawn), ("right", answer)):
            shown = text[-200:].decode("utf-8", "replace")
            lines.append(f"{title:>5}: {' '.join(shown.split())}")
        lines.append("")
    return "\n".join(lines)


def _summary(finetune: Finetune) -> dict[str, Any]:
    before, after, best = finetune.before, finetune.latest, finetune.best
    assert before is not None
    assert after is not None
    if not math.isfinite(after.nats):
        raise UserError(
            "the finetune diverged: the held-out loss is not finite; start anew with a lower --lr"
        )
    return {
        "held_out_answer_loss_before": before.nats,
        "held_out_answer_loss": after.nats,
        "reduction": 1 - after.nats / before.nats,
        "best_held_out_answer_loss": None if best is None else best["loss"],
        "best_step": None if best is None else best["step"],
        "held_out_answer_bytes": after.num_answer_ids,
        "held_out_conversations": after.num_examples,
        "conversations": len(finetune.data.train),
        "base": finetune.config.base,
        "base_fingerprint": finetune.config.base_fingerprint,
        "base_unchanged": not finetune.config.full,
        "full": finetune.config.full,
        "steps": finetune.step,
        "dropped_steps": finetune.dropped,
        "seconds": round(finetune.seconds, 3),
        "device": finetune.device.device.type,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "version": __version__,
    }


def _show_end(console: Console, finetune: Finetune, summary: Mapping[str, Any], samples: str) -> None:
    folder, config = finetune.folder, finetune.config
    before, after = summary["held_out_answer_loss_before"], summary["held_out_answer_loss"]
    base = "its trits voted on" if config.full else "not a bit of it changed (checksum verified)"
    rows = {
        "answers": f"held-out loss {before:.4f} -> {after:.4f} nats per byte "
        f"({-summary['reduction']:+.1%}), over {summary['held_out_answer_bytes']:,} bytes of "
        f"{summary['held_out_conversations']:,} {finetune.data.unit}",
        "base": f"{config.base}: {base}",
        "time": format_seconds(finetune.seconds),
        "run": f"{folder}: metrics.jsonl, loss.png, sample.txt, summary.json, latest/ best/ final/",
    }
    console.print()
    print_rows(console, rows)
    console.print()
    console.print(Text(printable(samples)), soft_wrap=True)
    name = shlex.quote(folder.name)
    use = f"generate {name} --image FILE --temperature 0" if config.vision else f"chat {name}"
    console.print(Text(f"next: arbitor {use}"), soft_wrap=True)


def _stopped(finetune: Finetune, diverged: bool, console: Console, guard: SignalGuard) -> int:
    where = f"step {finetune.step} of {finetune.config.steps}"
    if diverged:
        print(
            f"arbitor: error: stopped at {where}: the loss or a gradient was not finite in "
            f"{MAX_DROPPED_IN_A_ROW} steps in a row; saved {finetune.folder / 'latest'}, start a new "
            "finetune with a lower --lr or other data",
            file=sys.stderr,
        )
        return FAILED
    command = f"arbitor finetune --resume --run {shlex.quote(finetune.folder.name)}"
    console.print(
        f"stopped at {where}; saved {finetune.folder / 'latest'}; go on with: {command}",
        markup=False,
        soft_wrap=True,
    )
    return guard.exit_code
