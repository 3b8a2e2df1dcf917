"""`arbitor audio`, the command behind `training/audio.py`: what is heavy is imported inside it."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from arbitor import cli
from arbitor.cli import DATA, LOGGING, RUN, TRAINING, whole
from arbitor.errors import UserError
from arbitor.flags import PartFlags, flag_of

DEFAULT_STEPS = 300
TRIES = ("reconstruct", "hear", "say")
# By setting, where they are not those of `arbitor train`.
FLAGS = {
    "audio_rate": "--rate",
    "audio_samples": "--ctx",
    "audio_codes": "--codes",
    "audio_trits": "--trits",
    "audio_dim": "--codec-dim",
    "audio_layers": "--codec-layers",
}


def audio(
    *,
    task: Annotated[Literal["codec", "listen", "speak"] | None, Parameter(group=RUN)] = None,
    base: Annotated[str | None, Parameter(group=RUN)] = None,
    run: Annotated[str | None, Parameter(group=RUN)] = None,
    resume: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    reset: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    preset: Annotated[str | None, Parameter(group=RUN)] = None,
    reconstruct: Annotated[str | None, Parameter(group=RUN)] = None,
    hear: Annotated[str | None, Parameter(group=RUN)] = None,
    say: Annotated[str | None, Parameter(group=RUN)] = None,
    out: Annotated[str, Parameter(group=RUN)] = "out.wav",
    temperature: Annotated[float, Parameter(group=RUN)] = 0.7,
    data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    held_out: Annotated[str | None, Parameter(group=DATA)] = None,
    rate: Annotated[int | None, Parameter(group=DATA, converter=whole)] = None,
    no_augment: Annotated[bool, Parameter(group=DATA, show_default=False)] = False,
    equalise: Annotated[bool | None, Parameter(group=DATA, negative="--no-equalise")] = None,
    steps: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    batch: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    accum: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    ctx: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    codes: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    trits: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    codec_dim: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    codec_layers: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    disable_moe: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    disable_vq: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    disable_graph: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    enable_memory: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    memory_rows: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    max_moe_iters: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    state: Annotated[Literal["full", "compact", "lean"] | None, Parameter(group=TRAINING)] = None,
    lr: Annotated[float | None, Parameter(group=TRAINING)] = None,
    accum_threshold: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    e_accum_threshold: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    seed: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, Parameter(group=TRAINING)] = None,
    eval_steps: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    eval_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    save_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    log_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    no_save: Annotated[bool, Parameter(group=LOGGING, show_default=False)] = False,
) -> int:
    """Train an audio codec, or a model that listens or speaks; or try one on a sound or a text.

    Parameters
    ----------
    task
        What to learn: codec (the default), listen (sound to text) or speak (text to sound).
    base
        Run or checkpoint to start from; listening and speaking use its codec as it is.
    run
        Name of the run, a folder under ./runs; for --reconstruct, --hear and --say, the run to try.
    resume
        Go on with the run from its latest checkpoint, with its settings.
    reset
        Delete the run of that name and start it anew.
    preset
        Settings to start from; default tiny.
    reconstruct
        Audio file to send through a run's codec; the result is written to --out.
    hear
        Audio file whose text a run shall write.
    say
        Text that a run shall speak; the sound is written to --out.
    out
        WAV file to write.
    temperature
        Of --say; 0 takes the likeliest code always.
    data
        Folders, .tar archives, .jsonl or audio files; default tones and chirps that are synthesised.
    held_out
        Path, speaker:NAME, or share of the data, to measure on; default a tenth.
    rate
        Samples a second that recordings are brought to, a multiple of 200; default 8000 or 16000.
    no_augment
        Do not vary speed and loudness of the recordings.
    equalise
        Bring what --task listen hears to one spectrum in the long run, or only to one loudness; default as
        the base does, else on.
    steps
        Optimizer steps; default 300.
    batch
        Recordings per micro-batch.
    accum
        Micro-batches per step.
    ctx
        Samples of the longest sound; default one second.
    codes
        Codes of a fiftieth of a second.
    trits
        Trits of a code.
    codec_dim
        Width of the codec.
    codec_layers
        Blocks on each side of the codec's codes.
    disable_moe
        Leave the mixture of experts out.
    disable_vq
        Leave motifs out, and the graph with them.
    disable_graph
        Leave the motif graph out.
    enable_memory
        Add the n-gram memory.
    memory_rows
        Rows of each of the memory's hash tables.
    max_moe_iters
        Most iterations of the core.
    state
        What training keeps: full 2.3, compact 1.8 or lean 1.2 bytes a weight.
    lr
        Peak learning rate in trits per step; default by state.
    accum_threshold
        Accumulator value at which a trit flips; default by state.
    e_accum_threshold
        Accumulator value at which a scale exponent moves.
    seed
        Seed of weights, data order and rounding.
    device
        Where to compute; default auto.
    eval_steps
        Held-out recordings per evaluation during training.
    eval_interval
        Steps between evaluations; 0 is at the end only.
    save_interval
        Steps between checkpoints; 0 is at the end only.
    log_interval
        Steps between readings of the loss from the device.
    no_save
        Write no checkpoints at all.
    """
    tries = {
        name: value for name, value in zip(TRIES, (reconstruct, hear, say), strict=True) if value is not None
    }
    if tries:
        if len(tries) > 1 or task is not None or resume or data is not None:
            raise UserError(
                "--reconstruct, --hear and --say try a trained run: give one of them, without training"
            )
        from arbitor.audio_tries import try_run

        return try_run(
            run, next(iter(tries)), next(iter(tries.values())), out, temperature, seed, device or "auto"
        )
    if rate == 0:
        raise UserError("--rate 0: a sound has 2000 samples a second or more")
    given = {
        "data": data,
        "held_out": held_out,
        "audio_task": task,
        "audio_rate": rate,
        "audio_samples": ctx,
        "audio_codes": codes,
        "audio_trits": trits,
        "audio_dim": codec_dim,
        "audio_layers": codec_layers,
        "audio_equalise": equalise,
        "augment": False if no_augment else None,
        "steps": steps,
        "batch": batch,
        "accum": accum,
        "state": state,
        "lr": lr,
        "accum_threshold": accum_threshold,
        "e_accum_threshold": e_accum_threshold,
        "seed": seed,
        "device": device,
        "eval_steps": eval_steps,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
        "log_interval": log_interval,
        "save": False if no_save else None,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not resume:
        settings = _defaults(settings, base)
    parts = PartFlags(
        without=cli.left_out(moe=disable_moe, vq=disable_vq, graph=disable_graph),
        memory=enable_memory,
        memory_rows=memory_rows,
        max_moe_iters=max_moe_iters,
    )
    if parts != PartFlags():
        settings |= cli._part_settings(parts, preset, None, run, resume, base)
    from arbitor.train.session import start_training

    return start_training(
        settings, preset=preset, run=run, resume=resume, reset=reset, base=base, flags=FLAGS
    )


def _defaults(settings: dict[str, Any], base: str | None) -> dict[str, Any]:
    """The settings, with what follows from the data and the task.

    Raises:
        UserError: the base has no codec to listen or to speak with, or a setting is of another task.
    """
    usual: dict[str, Any] = {"audio_task": "codec", "steps": DEFAULT_STEPS}
    task = settings.get("audio_task", "codec")
    if "audio_equalise" in settings and task != "listen":
        flag = flag_of("audio_equalise", settings["audio_equalise"])
        raise UserError(f"{flag} is about what is heard: give it with --task listen, not {task}")
    if base is None or not _has_codec(base):
        from arbitor.data.audio import default_rate
        from arbitor.train.learnt import refusal_of_base

        if base is not None and task != "codec" and "audio_rate" not in settings:
            raise UserError(refusal_of_base(base, task, "codec"))
        if "audio_rate" not in settings:
            usual["audio_rate"] = default_rate(settings.get("data", ()))
        usual["audio_samples"] = settings.get("audio_rate", usual.get("audio_rate"))
    if base is None and task != "codec":
        print(
            "arbitor: note: without --base the codec stays as it was drawn, which is enough to try, and "
            "not to speak: train one with --task codec first",
            file=sys.stderr,
        )
    return usual | settings


def _has_codec(base: str) -> bool:
    from arbitor.config import load_config
    from arbitor.train import runs

    return bool(load_config(runs.find_checkpoint(base) / runs.CONFIG_FILE).model.audio_rate)


def main(tokens: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return cli.main(["audio", *tokens])
