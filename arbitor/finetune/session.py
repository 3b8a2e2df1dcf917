"""`arbitor finetune` from its settings to its exit code: find or make the run, learn, tell how it ended."""

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from arbitor import __version__
from arbitor.config import dump_toml, in_order, load_config
from arbitor.errors import UserError
from arbitor.finetune.adapter import find_adapter
from arbitor.finetune.config import AUDIO_TASKS, CONFIG_FILE, FinetuneConfig, load_finetune
from arbitor.finetune.loop import MAX_DROPPED_IN_A_ROW, Finetune
from arbitor.finetune.lora import fingerprint
from arbitor.finetune.material import LOSS_UNITS, Material, open_material
from arbitor.finetune.methods import AdapterMethod, VoteMethod, adapter_of, verified_state
from arbitor.flags import flag_of
from arbitor.model import ARBModel
from arbitor.train import runs, swap
from arbitor.train.checkpoint import Checkpoint, load_checkpoint
from arbitor.train.device import Device, deterministic, resolve_device, resumed_threads, thread_count
from arbitor.train.display import Display, format_bytes, format_seconds, printable
from arbitor.train.learnt import lacks, learnt_of, maker
from arbitor.train.metrics import MetricsLog
from arbitor.train.plot import plot_loss
from arbitor.train.report import print_rows
from arbitor.train.signals import Interrupted, SignalGuard, unwinding
from arbitor.train.tensorfile import DamagedError

FAILED = 1
_SIDECARS = {"vision": "image_size", "audio": "audio_rate", "video": "video_size"}
_LEARNT_FIRST = {"vision": "image", "audio": "codec", "video": "flow"}  # by a run that has the sidecar


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
        data = open_material(config, base.config)
        with contextlib.closing(MetricsLog(folder)) as log:
            return _run(config, base, model, data, device, folder, log, console, resume=True)
    if run is not None and runs.run_path(run).exists():
        raise UserError(f"the run {run!r} exists: go on with --resume, or choose another --run")
    if (adapter := None if checkpoint is None else find_adapter(checkpoint)) is not None:
        raise UserError(
            f"{adapter} is an adapter; a finetune starts from a base: give the run or checkpoint of one"
        )
    folder_of_base = _find_base(checkpoint, settings)
    device = resolve_device(settings.get("device", "auto"))
    base, model = _load_base(str(folder_of_base), device)
    if settings.get("audio") and "audio_task" not in settings:
        trained = base.config.data.audio_task
        settings = {**settings, "audio_task": trained if trained in AUDIO_TASKS else AUDIO_TASKS[0]}
    config = FinetuneConfig(base=str(folder_of_base), base_fingerprint=fingerprint(model), **settings)
    _refuse_idle_settings(config, settings)
    data = open_material(config, base.config)
    if not config.full:
        adapter_of(model, config, data.apart)  # what it cannot be made of is told before a folder is made
    with unwinding():
        folder = runs.make_run(f"{_base_name(folder_of_base)}-{'full' if config.full else 'lora'}", run)
        try:
            with contextlib.closing(MetricsLog(folder)) as log:
                swap.write_file(folder / CONFIG_FILE, config.dump())
                return _run(config, base, model, data, device, folder, log, console, resume=False)
        except BaseException:
            runs.remove_if_untrained(folder)  # what never took a step shall not keep the name
            raise


def list_finetunes() -> list[Path]:
    """All finetunes under ./runs, newest first."""
    if not runs.RUNS.is_dir():
        return []
    found = [
        path for path in runs.RUNS.iterdir() if (path / CONFIG_FILE).is_file() and not runs.is_former(path)
    ]
    return sorted(found, key=lambda path: _made(path / CONFIG_FILE), reverse=True)


def newest_adapter(wanted: Sequence[str]) -> Path | None:
    """The adapter of the newest finetune on conversations.

    None if a run that has learnt what is `wanted` is newer, if it voted on trits, or if there is none.
    """
    finetune = next((path for path in list_finetunes() if _learns(path) in (("chat",), None)), None)
    if finetune is None:
        return None
    newest = runs.newest_checkpoint(wanted)
    if newest is not None and _made(newest.parent / runs.CONFIG_FILE) >= _made(finetune / CONFIG_FILE):
        return None
    return find_adapter(finetune)


def learnt_by_adapter(adapter: Path, base: Path) -> tuple[str, ...] | None:
    """What an adapter on its base has learnt, of `arbitor.config.LEARNT`; None if that is not known."""
    learns, before = _learns(adapter.parent), learnt_by_checkpoint(base)
    return None if learns is None or before is None else in_order({*learns, *before})


def learnt_by_checkpoint(checkpoint: Path) -> tuple[str, ...] | None:
    """What a checkpoint has learnt, as `learnt_by_adapter` says it.

    In a finetune with `--full` by an earlier version, settings beside the weights are those of its base.
    """
    learnt, learns = learnt_of(checkpoint), _learns(checkpoint.parent)
    return learnt if learnt is None or learns is None else in_order({*learnt, *learns})


def _learns(finetune: Path) -> tuple[str, ...] | None:
    """What the data of a finetune teaches; None if its settings cannot be read."""
    try:
        return load_finetune(finetune).learns
    except UserError:
        return None


def _made(path: Path) -> int:
    return path.stat().st_mtime_ns


def _run(
    config: FinetuneConfig,
    base: Checkpoint,
    model: ARBModel,
    data: Material,
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
    threads = torch.get_num_threads() if state is None else resumed_threads(int(state["threads"]))
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
            method = AdapterMethod(model, config, data.apart)
        finetune = Finetune(config, model, method, data, device, folder, log, display, guard)
        if source is not None:
            finetune.restore(source)
        method.set_training(True)
        _show_start(console, finetune, base)
        outcome = finetune.run_steps()
        samples = None
        if outcome.finished:
            with contextlib.suppress(Interrupted), finetune.undisturbed():
                samples = data.samples(model, folder / "samples")
    if not config.full and fingerprint(model) != config.base_fingerprint:
        raise RuntimeError("the base's weights changed during a finetune of adapters")
    plot_loss(log.path, folder / "loss.png", f"{folder.name}: {data.measures}")
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


def _find_base(checkpoint: str | None, settings: Mapping[str, Any]) -> Path:
    """The base that is named; else the newest run with the part which the data needs, if there is one.

    For conversations it must have learnt text. Finetunes with `--full` are runs too, but no base unless
    named.
    """
    needed = [field for name, field in _SIDECARS.items() if settings.get(name)]
    wanted = () if needed or "audio_task" in settings else ("text",)
    made_by = maker([what for name, what in _LEARNT_FIRST.items() if settings.get(name)] or wanted)
    if checkpoint is not None:
        return runs.find_checkpoint(checkpoint, wanted, made_by=made_by)
    for run in runs.list_runs():
        if not (run / CONFIG_FILE).is_file():
            with contextlib.suppress(UserError):
                model = load_config(run / runs.CONFIG_FILE).model
                if all(getattr(model, field) for field in needed):
                    found = runs.find_checkpoint(run)
                    if not lacks(learnt_of(found), wanted):
                        return found
    return runs.find_checkpoint(None, wanted, made_by=made_by)


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


def _summary(finetune: Finetune) -> dict[str, Any]:
    before, after, best, data = finetune.before, finetune.latest, finetune.best, finetune.data
    assert before is not None
    assert after is not None
    if not math.isfinite(after.loss):
        raise UserError(
            "the finetune diverged: the held-out loss is not finite; start anew with a lower --lr"
        )
    name = data.measures.replace(" ", "_")
    rights = {} if after.right is None else {"right_before": before.right, "right": after.right}
    return {
        "figure": name,
        f"held_out_{name}_before": before.loss,
        f"held_out_{name}": after.loss,
        "reduction": 1 - after.loss / before.loss,
        f"best_held_out_{name}": None if best is None else best["loss"],
        "best_step": None if best is None else best["step"],
        **rights,
        key_of_bytes(data): after.count,
        f"held_out_{data.unit}": after.num_examples,
        data.unit: data.num_train,
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


def key_of_bytes(data: Material) -> str:
    """Under which `summary.json` has how many bytes were predicted."""
    return "held_out_answer_bytes" if data.measures == "answer loss" else "held_out_bytes"


def _show_end(console: Console, finetune: Finetune, summary: Mapping[str, Any], samples: str) -> None:
    folder, config = finetune.folder, finetune.config
    data, key = finetune.data, f"held_out_{summary['figure']}"
    before, after = summary[f"{key}_before"], summary[key]
    base = "its trits voted on" if config.full else "not a bit of it changed (checksum verified)"
    rows = {
        data.measures: f"held-out loss {before:.4f} -> {after:.4f} {LOSS_UNITS[data.figure]} "
        f"({-summary['reduction']:+.1%}), over {summary[key_of_bytes(data)]:,} bytes of "
        f"{summary[f'held_out_{data.unit}']:,} {data.unit}",
        **_rights(summary),
        "base": f"{config.base}: {base}",
        "time": format_seconds(finetune.seconds),
        "run": f"{folder}: metrics.jsonl, loss.png, sample.txt, summary.json, "
        + ("samples/, " if (folder / "samples").is_dir() else "")
        + "latest/ best/ final/",
    }
    console.print()
    print_rows(console, rows)
    console.print()
    if samples:
        console.print(Text(printable(samples)), soft_wrap=True)
    console.print(Text(f"next: {_next_command(config, folder)}"), soft_wrap=True)


def _rights(summary: Mapping[str, Any]) -> dict[str, str]:
    """How many texts were written right, where that was tried."""
    if (right := summary.get("right")) is None:
        return {}
    return {"written right": f"{100 * summary['right_before']:.1f} % -> {100 * right:.1f} %"}


def _next_command(config: FinetuneConfig, folder: Path) -> str:
    """A command line that tries the finetune just made."""
    name = shlex.quote(folder.name)
    if config.audio:
        what = "--hear FILE" if config.audio_task == "listen" else "--say TEXT"
        return f"arbitor audio {what} --run {name}"
    if config.video:
        return f"arbitor diffusion --sample TEXT --run {name}"
    return (
        f"arbitor generate {name} --image FILE --temperature 0" if config.vision else f"arbitor chat {name}"
    )


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
    saved = f"saved {finetune.folder / 'latest'}" if finetune.has_saved else "nothing was learnt yet"
    console.print(
        f"stopped at {where}; {saved}; go on with: {command}",
        markup=False,
        soft_wrap=True,
    )
    return guard.exit_code
