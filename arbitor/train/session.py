"""`arbitor train` from its settings to its exit code: find or make the run, train it, tell how it ended."""

import contextlib
import functools
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from rich.console import Console

from arbitor.config import MIXED, RunConfig, dump_toml, load_config, override, written_settings
from arbitor.config import preset as preset_config
from arbitor.data import open_corpus
from arbitor.data.audio import open_training_audio
from arbitor.data.contents import unused_field
from arbitor.data.images import Geometry, open_training_images
from arbitor.data.mixed import open_mix
from arbitor.data.video import ClipGeometry, open_videos
from arbitor.errors import UserError
from arbitor.flags import flag_of, naming_flags, put_usual
from arbitor.ops import compilers
from arbitor.ternary.optimizer import SIGN_THRESHOLD, STATES
from arbitor.train import report, runs, swap
from arbitor.train.ahead import compile_for_run
from arbitor.train.checkpoint import Checkpoint, load_checkpoint
from arbitor.train.device import (
    Device,
    deterministic,
    gradient_products,
    resolve_device,
    resumed_threads,
    thread_count,
)
from arbitor.train.display import Display, PatientOutput, format_bytes
from arbitor.train.growth import added_sidecars
from arbitor.train.loop import MAX_DROPPED_IN_A_ROW, Run, Trainer
from arbitor.train.metrics import FIGURES, HELD_OUT, MetricsLog, refuse_busy
from arbitor.train.mix import MixTask
from arbitor.train.plot import plot_loss
from arbitor.train.schedule import default_peak
from arbitor.train.signals import Interrupted, SignalGuard, unwinding
from arbitor.train.task import HELD_OUT_BYTES, Corpus
from arbitor.train.tensorfile import NewerError

FAILED = 1


def start_training(
    settings: Mapping[str, Any],
    *,
    preset: str | None = None,
    config_file: str | None = None,
    run: str | None = None,
    resume: bool = False,
    reset: bool = False,
    base: str | None = None,
    show_next: bool = True,
    console: Console | None = None,
    flags: Mapping[str, str] | None = None,
) -> int:
    """Train a run, new or resumed, to its end or to a signal.

    A resumed run may be given more `steps` than it has, finished or not. The learning rate is then that of a
    run of so many steps: where the new cosine stands at this step, which is above where the old one had got
    to, and from there down to 0 at the new end.

    Resumed with a sidecar that the run has not, its newest checkpoint grows into a new run: weights and
    training state are taken over, steps and data begin anew, and the old run stays as it is.

    Args:
        settings: fields of `ModelConfig`, `TrainConfig` and `DataConfig` that were given by name.
        preset: where a new run's settings start from; None is the config file's, else `tiny`.
        config_file: TOML laid over the preset and under `settings`.
        run: name of the run; None makes the next `<preset>-<number>`, or resumes the newest.
        resume: go on with an existing run and its own settings.
        reset: delete the run of that name first.
        base: run or checkpoint whose weights, training state and settings a new run starts from; parts that
            `settings` add are drawn.
        show_next: end a new run with the command that tries it; False where the caller goes on by itself.
        console: where progress goes; None is stdout.
        flags: of the command, by setting, where they are not those of `arbitor train`.

    Returns:
        Exit code: 0 finished, 1 too many steps dropped in a row, 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: anything given that cannot be used; nothing was changed then.
    """
    console = console or _console()
    if settings.get("device") != "cpu":
        compilers.fork_compilers()  # ahead of the first look at the GPU
    if resume and reset:
        raise UserError("--resume goes on with a run and --reset deletes it: give one of them")
    if run is not None:
        runs.put_back(runs.run_path(run))
    if resume:
        folder = runs.existing_run(run)
        if (folder / runs.FINETUNE_FILE).is_file():
            raise UserError(
                f"the run {folder.name!r} is a finetune; go on with: "
                f"arbitor finetune --resume --run {shlex.quote(folder.name)}"
            )
        config = load_config(folder / runs.CONFIG_FILE)
        if added_sidecars(config.model, settings):
            _refuse_other_settings(folder.name, preset, config_file)
            return _grow(_newest_checkpoint(folder, console), settings, None, console, flags)
        device = resolve_device(settings.get("device") or config.train.device)
        _refuse_contradiction(folder, config, device, settings, preset, config_file, flags)
        longer = override(config, steps=max(settings.get("steps", 0), config.train.steps))
        if runs.is_finished(folder) and longer == config:
            console.print(_finished_line(folder), markup=False, soft_wrap=True)
            return 0
        return _resume(folder, longer, _open(config, settings), device, console)
    if reset and run is None:
        raise UserError("--reset deletes a run and starts it anew: name it with --run")
    if base is not None:
        _refuse_other_settings(base, preset, config_file)
        if run is not None and not reset:
            _refuse_existing(run)
        if run is not None and reset and runs.run_path(run).exists():
            raise UserError(
                f"--reset would delete {run!r} ahead of a run that starts from another: delete it first"
            )
        return _grow(load_checkpoint(runs.find_checkpoint(base)), settings, run, console, flags)
    config = _settled(_new_config(settings, preset, config_file, flags))
    if run is not None and not reset:
        _refuse_existing(run)
    device = resolve_device(config.train.device)
    corpus = _open(config, settings)
    if run is not None and reset and runs.run_path(run).exists():
        refuse_busy(runs.run_path(run))
        with runs.replacing(runs.run_path(run)):
            return _train_new(config, corpus, device, console, run, show_next=show_next)
    return _train_new(config, corpus, device, console, run, show_next=show_next)


def _refuse_existing(run: str) -> None:
    refuse_busy(runs.run_path(run))  # which the run's own files do not tell
    runs.refuse_existing(run)


def _refuse_other_settings(base: str, preset: str | None, config_file: str | None) -> None:
    if preset is not None or config_file is not None:
        given = "--preset" if preset is not None else "--config"
        raise UserError(f"{given}: a run that grows has the settings of {base!r}; leave it out")


def _grow(
    base: Checkpoint,
    settings: Mapping[str, Any],
    run: str | None,
    console: Console,
    flags: Mapping[str, str] | None,
) -> int:
    """Train a new run that starts from another one's checkpoint, with the parts that `settings` add."""
    config = base.config
    others: dict[str, Any] = {
        "data": (),
        "audio_task": "",
        "video_task": "",
        "learnt_before": config.learnt,
    }
    others |= {f"{name}_weight": 0.0 for name in MIXED}
    if not (config.mix.active and any(settings.get(f"{name}_weight") for name in MIXED)):
        # Other data than that of the base: its settings do not mean anything for other media. A mixed run
        # that starts from a mixed one keeps its data, and shall not be measured on what was learnt from.
        others |= {"held_out": None, "field": "text"}
    if config.model.video_size and settings.get("autoencoder") is not None:
        raise UserError(
            f"--autoencoder {settings['autoencoder']}: {base.folder} has an autoencoder already; leave it "
            "out, or start from a run that takes no clips"
        )
    settings = _with_autoencoder(settings, config, {})
    with naming_flags(settings, flags):
        grown = override(config, **{**others, **settings})
    device = resolve_device(grown.train.device)
    corpus = _open(grown, settings)
    return _train_new(grown, corpus, device, console, run, base)


def _train_new(
    config: RunConfig,
    corpus: Corpus,
    device: Device,
    console: Console,
    run: str | None,
    base: Checkpoint | None = None,
    *,
    show_next: bool = True,
) -> int:
    _refuse_too_large(config, device)
    with unwinding():
        folder = runs.make_run(config.preset, run)
        try:
            with contextlib.closing(MetricsLog(folder)) as log:
                swap.write_file(folder / runs.CONFIG_FILE, dump_toml(config))
                return _train(folder, config, corpus, device, log, None, console, base, show_next=show_next)
        except BaseException:
            runs.remove_if_untrained(folder)  # what never took a step shall not keep the name
            raise


def _refuse_too_large(config: RunConfig, device: Device) -> None:
    """Raise UserError if the embeddings of a micro-batch alone exceed what there is.

    A kernel that promises more memory than it has ends a process without a word, so this is asked ahead.
    """
    needed = config.train.batch * config.model.ctx * config.model.dim * 2  # bf16, or more
    if needed > (there := device.total_memory()):
        raise UserError(
            f"--batch {config.train.batch} with a context of {config.model.ctx} needs more than "
            f"{format_bytes(needed)}, and {device.name} has {format_bytes(there)}; a smaller --batch with a "
            "larger --accum needs less"
        )


def _console() -> Console:
    """The one of stdout, wherever that leads."""
    if sys.stdout is None:
        return Console(highlight=False, quiet=True)
    return Console(highlight=False, file=cast(TextIO, PatientOutput(sys.stdout)))


def _resume(
    folder: Path,
    config: RunConfig,
    corpus: Corpus,
    device: Device,
    console: Console,
) -> int:
    with contextlib.closing(MetricsLog(folder)) as log:
        for name in runs.CHECKPOINTS:
            swap.recover(folder / name, keep_previous=name == "latest")
        checkpoint = _newest_checkpoint(folder, console)
        runs.forget_former(folder)
        if not _is_longer(config, checkpoint.config) and checkpoint.model_config == config.model:
            raise UserError(
                f"{folder / runs.CONFIG_FILE} is not what {checkpoint.folder} was trained with; put it back "
                f"from {checkpoint.folder / runs.CONFIG_FILE}, or start a new run"
            )
        if load_config(folder / runs.CONFIG_FILE) != config:
            # In this order: killed in between, the run is one that has yet to be measured once more.
            (folder / runs.SUMMARY_FILE).unlink(missing_ok=True)
            swap.write_file(folder / runs.CONFIG_FILE, dump_toml(config))
        log.cut_after(int(checkpoint.state["step"]))
        threads = resumed_threads(int(checkpoint.state["threads"]))
        for line in _differences(checkpoint, device, threads):
            console.print(line, markup=False, soft_wrap=True)
        with thread_count(threads):
            return _train(folder, config, corpus, device, log, checkpoint, console)


def _is_longer(config: RunConfig, trained: RunConfig) -> bool:
    """Whether `config` is what a checkpoint was `trained` with, with as many steps or more."""
    steps = config.train.steps
    # What was learnt before says nothing of how to train, and settings of earlier versions leave it out.
    as_now = override(trained, steps=steps, learnt_before=config.data.learnt_before)
    return as_now == config and trained.train.steps <= steps


def _new_config(
    settings: Mapping[str, Any], preset: str | None, config_file: str | None, flags: Mapping[str, str] | None
) -> RunConfig:
    base = None if preset is None else preset_config(preset)
    if config_file is not None:
        base = load_config(config_file, base)
    base = base or preset_config("tiny")
    written = {} if config_file is None else written_settings(config_file)
    settings = _with_autoencoder(settings, base, written)
    with naming_flags(settings, flags):
        # The file may be that of a run which started from another one; this one starts from none.
        return override(base, **{**settings, "learnt_before": ()})


def _with_autoencoder(
    settings: Mapping[str, Any], base: RunConfig, written: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The settings with those that follow from the frozen autoencoder they, or the base's, name.

    Args:
        settings: given by flags.
        base: what they are laid over.
        written: the settings of the config file.

    Raises:
        UserError: an autoencoder that cannot be used.
    """
    source = settings.get("autoencoder", base.data.autoencoder)
    if source is None:
        return settings
    if not settings.get("video_size", base.model.video_size):
        print(f"arbitor: note: autoencoder {source} has no effect: the model takes no clips", file=sys.stderr)
        return settings
    if base.model.video_autoencoder and "autoencoder" not in settings:
        return settings
    from arbitor.sidecars.vae import geometry_of, read_architecture

    architecture = read_architecture(source)
    more = {**settings, "video_autoencoder": architecture}
    put_usual(more, geometry_of(architecture), written, "video_size")
    return more


def _settled(config: RunConfig) -> RunConfig:
    """The configuration with the defaults of its state written out, so that a later version resumes alike."""
    train = config.train
    lr = default_peak(config) if train.lr is None else train.lr
    usual = SIGN_THRESHOLD if train.rule == "sign" else STATES[train.state].threshold
    return override(config, lr=lr, accum_threshold=train.accum_threshold or usual)


def _open(config: RunConfig, settings: Mapping[str, Any]) -> Corpus:
    data, model = config.data, config.model
    if config.mix.active:
        return open_mix(config)
    if data.video_task:
        if not model.video_size:
            raise UserError("video_task is set for a model without the video sidecar; set video_size as well")
        clip = ClipGeometry(size=model.video_size, frames=model.video_frames, channels=model.video_channels)
        return open_videos(data.data, data.held_out, clip)
    if data.audio_task:
        if not config.model.audio_rate:
            raise UserError("audio_task is set for a model without the audio sidecar; set audio_rate as well")
        return open_training_audio(data.data, data.held_out, config.model.audio_rate)
    if config.model.image_size:
        geometry = Geometry(size=config.model.image_size, channels=config.model.image_channels)
        # "text" is the usual field of texts; of captions, two names are usual.
        named = data.field if "field" in settings or data.field != "text" else None
        return open_training_images(data.data, data.held_out, geometry, named)
    corpus = open_corpus(data.data, data.held_out, data.field, min_bytes=config.model.ctx)
    if "field" in settings and not corpus.has_fields:
        print(f"arbitor: note: {unused_field(data.field)}", file=sys.stderr)
    return corpus


def _refuse_contradiction(
    folder: Path,
    config: RunConfig,
    device: Device,
    settings: Mapping[str, Any],
    preset: str | None,
    config_file: str | None,
    flags: Mapping[str, str] | None,
) -> None:
    """Raise UserError if something given differs from what the run was made with."""
    where = f"{folder / runs.CONFIG_FILE}; leave it out to resume, or start a new run"
    if preset is not None and preset != config.preset:
        raise UserError(f"--preset {preset} contradicts the run's preset {config.preset!r} in {where}")
    before = config.data.learnt_before  # of what starts a run, whatever a file says
    if config_file is not None and override(load_config(config_file, config), learnt_before=before) != config:
        raise UserError(f"--config {config_file} contradicts the run's settings in {where}")
    for name, value in settings.items():
        with naming_flags((name,), flags):
            given = override(config, **{name: value})
        if given == config or (name == "steps" and value > config.train.steps):
            continue
        if name == "device" and resolve_device(config.train.device).device == device.device:
            continue
        sections = (config.model, config.train, config.data, config.mix)
        own = next(getattr(section, name) for section in sections if hasattr(section, name))
        flag = flag_of(name, value, flags)
        if not isinstance(value, bool):
            flag += f" {_shown(value)}"
        more = " (it can only be raised)" if name == "steps" else ""
        raise UserError(f"{flag} contradicts the run's {name} = {_shown(own)}{more} in {where}")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "(the embedded corpus)"
    return "(unset)" if value is None else str(value)


def _newest_checkpoint(folder: Path, console: Console) -> Checkpoint:
    """The state to resume from: `latest`, else, if that cannot be loaded, the one before it or `best`.

    Raises:
        UserError: none can be loaded, or one is the work of a later arbitor, which an older one shall not
            replace.
    """
    latest = folder / "latest"
    previous = swap.previous_of(latest)
    problems = []
    found = []
    for path in (latest, previous, folder / "best"):
        if not path.is_dir():
            continue
        try:
            found.append(load_checkpoint(path))
        except NewerError:
            raise
        except UserError as error:
            problems.append(str(error))
            continue
        if path == latest:
            break
    if not found:
        reason = problems[0] if problems else f"{folder} holds no checkpoint"
        if runs.former_of(folder).is_dir():
            reason += f" (what --reset was replacing is in {runs.former_of(folder)})"
        raise UserError(
            f"cannot resume: {reason}; start the run anew with --run {shlex.quote(folder.name)} --reset"
        )
    checkpoint = max(found, key=lambda c: int(c.state["step"]))
    for problem in problems:
        console.print(f"warning: {problem}", markup=False, soft_wrap=True)
    if problems:
        step = checkpoint.state["step"]
        console.print(
            f"resuming from the checkpoint of step {step} in {checkpoint.folder}",
            markup=False,
            soft_wrap=True,
        )
    if checkpoint.folder == previous and latest.is_dir():
        swap.restore_previous(latest)
    return checkpoint


def _differences(checkpoint: Checkpoint, device: Device, threads: int) -> list[str]:
    """Lines about what may make the resumed losses differ in their last bits, or had to be changed."""
    state = checkpoint.state
    lines = []
    if threads != torch.get_num_threads() and not device.is_cuda:
        lines.append(
            f"using {threads} threads, as before, so that sums come out the same; OMP_NUM_THREADS sets "
            "another number"
        )
    now: dict[str, object] = {
        "torch": str(torch.__version__),
        "device": device.device.type,
        "gradients": gradient_products(device.device),
    }
    if not device.is_cuda:
        now["threads"] = threads
    for name, value in now.items():
        before = state.get(name, value)
        if before != value:
            lines.append(
                f"warning: the run had {name} {before}, now {value}: "
                "losses may differ in their last bits from an uninterrupted run"
            )
    return lines


def _train(
    folder: Path,
    config: RunConfig,
    corpus: Corpus,
    device: Device,
    log: MetricsLog,
    checkpoint: Checkpoint | None,
    console: Console,
    base: Checkpoint | None = None,
    *,
    show_next: bool = True,
) -> int:
    compile_for_run(config, device, lambda line: console.print(line, markup=False, soft_wrap=True))
    with deterministic(config.train.seed, device.device), SignalGuard() as guard:
        trainer = Trainer(config, corpus, device, checkpoint, base)
        for line in trainer.growth:
            console.print(line, markup=False, soft_wrap=True)
        report.show_start(console, trainer, folder)
        with Display(console, config.train.steps) as display:
            run = Run(trainer, folder, log, display, guard)
            outcome = run.run_steps()
            finished = None
            if outcome.finished:
                with contextlib.suppress(Interrupted):
                    finished = _finish(run)
        title = f"{folder.name}: {config.preset}, state {config.train.state}"
        with _naming_folder(folder):
            plot_loss(log.path, folder / "loss.png", title)
        if finished is not None:
            summary, prompt, sample = finished
            text = (prompt + sample).decode("utf-8", errors="replace")
            with _naming_folder(folder):
                swap.write_file(folder / "sample.txt", text)
                # Last of all: a run with a summary counts as finished.
                swap.write_file(folder / runs.SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
            rows: dict[str, str] = {}
            if isinstance(trainer.task, MixTask):
                rows = trainer.task.summary_rows(summary)
            report.show_end(console, config, folder, summary, prompt, sample, rows, show_next=show_next)
            return 0
        saved = f"saved {folder / 'latest'}" if config.train.save else "nothing was saved (--no-save)"
        where = f"step {trainer.step} of {config.train.steps}"
        if outcome.diverged:
            advice = "start a new run with a lower --lr or other data"
            _complain(
                f"stopped at {where}: the loss or a gradient was not finite in {MAX_DROPPED_IN_A_ROW} "
                f"steps in a row; {saved}, {advice}"
            )
            return FAILED
        go_on = f"; go on with: {report.resume_command(folder)}" if config.train.save else ""
        console.print(f"stopped at {where}; {saved}{go_on}", markup=False, soft_wrap=True)
        return guard.exit_code


@contextlib.contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Errors of the disk, which may name no file, name the run."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; its checkpoints are whole, "
            f"`{report.resume_command(folder)}` writes the rest"
        ) from error


def _finish(run: Run) -> tuple[dict[str, Any], bytes, bytes]:
    """Evaluate the final weights, save them as `final` and sample; summary, prompt and sample."""
    trainer = run.trainer
    most = trainer.last_windows * trainer.config.model.ctx
    size = min(trainer.task.held_out_bytes, HELD_OUT_BYTES, most)
    run.display.note(f"measuring on up to {format_bytes(size)} held out, then writing a sample")
    shown = functools.partial(run.display.progress, "measuring: window")
    result = run.undisturbed(lambda: trainer.evaluate(max_windows=trainer.last_windows, progress=shown))
    if not math.isfinite(result.bits_per_byte):
        raise UserError(
            f"training diverged: the logits of the last step are not finite; {run.folder / 'best'} may be of "
            "use, or start a new run with a lower --lr or --scale-lr"
        )
    run.save_or_end(lambda: run.save("final"))
    prompt, sample = run.undisturbed(lambda: report.sample_of(trainer))
    if (write := getattr(trainer.task, "write_samples", None)) is not None:
        with _naming_folder(run.folder):
            (run.folder / "samples").mkdir(exist_ok=True)
        try:
            run.undisturbed(lambda: write(trainer.model, run.folder / "samples"))
        except UserError as error:  # the run is finished all the same
            run.display.note(f"warning: not all samples are written: {error}")
    summary = report.summarise(trainer, result, run.seconds)
    return summary, prompt, sample


def _finished_line(folder: Path) -> str:
    summary = runs.read_summary(folder)
    key, steps = summary.get("figure", "bits_per_byte"), summary["steps"]
    return (
        f"the run {folder.name!r} is finished with {summary[HELD_OUT + key]:.4f} held-out {FIGURES[key]} "
        f"({steps} steps); "
        f"nothing to do (a larger --steps trains it longer)"
    )


def _complain(message: str) -> None:
    print(f"arbitor: error: {message}", file=sys.stderr)
