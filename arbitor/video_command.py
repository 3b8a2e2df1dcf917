"""`arbitor diffusion`, the command behind `training/diffusion.py`: what is heavy is imported inside it."""

import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from arbitor import cli
from arbitor.cli import DATA, LOGGING, RUN, TRAINING, whole
from arbitor.errors import UserError
from arbitor.flags import flag_of, naming_flags

CODEC_STEPS = 300
CODEC_STEPS_PER_FLOW_STEP = 10  # at most, so that a short try of both parts is short
FLOW_STEPS = 400
BATCH = 32
FLOW_RATE = 0.5  # of the usual peak learning rate of a state
CAPTION_IDS = 64  # of one's own captions; the names of digits are shorter
# By setting, where they are not those of `arbitor train`.
FLAGS = {
    "video_size": "--size",
    "video_frames": "--frames",
    "video_channels": "--channels",
    "video_ids": "--caption-ids",
    "video_dim": "--dim",
    "video_layers": "--layers",
    "video_patch": "--patch",
    "video_stride": "--stride",
}


def diffusion(
    *,
    task: Annotated[Literal["codec", "flow"] | None, Parameter(group=RUN)] = None,
    base: Annotated[str | None, Parameter(group=RUN)] = None,
    run: Annotated[str | None, Parameter(group=RUN)] = None,
    resume: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    reset: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    preset: Annotated[str | None, Parameter(group=RUN)] = None,
    sample: Annotated[list[str] | None, Parameter(group=RUN, consume_multiple=1)] = None,
    count: Annotated[int, Parameter(group=RUN, converter=whole)] = 4,
    out: Annotated[str, Parameter(group=RUN)] = "out.gif",
    sampler: Annotated[Literal["euler", "heun"], Parameter(group=RUN)] = "heun",
    sample_steps: Annotated[int, Parameter(group=RUN, converter=whole)] = 32,
    guidance: Annotated[float, Parameter(group=RUN)] = 1.0,
    data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    held_out: Annotated[str | None, Parameter(group=DATA)] = None,
    size: Annotated[int | None, Parameter(group=DATA, converter=whole)] = None,
    frames: Annotated[int | None, Parameter(group=DATA, converter=whole)] = None,
    channels: Annotated[int | None, Parameter(group=DATA, converter=whole)] = None,
    caption_ids: Annotated[int | None, Parameter(group=DATA, converter=whole)] = None,
    steps: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    codec_steps: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    batch: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    accum: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    dim: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    layers: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    patch: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    stride: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    autoencoder: Annotated[str | None, Parameter(group=TRAINING)] = None,
    state: Annotated[Literal["full", "compact", "lean"] | None, Parameter(group=TRAINING)] = None,
    lr: Annotated[float | None, Parameter(group=TRAINING)] = None,
    seed: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, Parameter(group=TRAINING)] = None,
    eval_steps: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    eval_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    save_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    log_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    no_save: Annotated[bool, Parameter(group=LOGGING, show_default=False)] = False,
) -> int:
    """Train an autoencoder of clips and a flow that draws its latents, one after the other; or draw clips.

    Parameters
    ----------
    task
        What to learn: codec (the autoencoder) or flow; default the one, then the other.
    base
        Run or checkpoint to start from; the flow uses its autoencoder as it is.
    run
        Name of the run, a folder under ./runs; the autoencoder ahead of it has "-codec" behind its name. For
        --sample, the run to draw with.
    resume
        Go on with the run from its latest checkpoint, with its settings.
    reset
        Delete the run of that name and start it anew.
    preset
        Settings to start from; default tiny.
    sample
        Captions to draw clips to, with a trained run.
    count
        Clips of each caption.
    out
        File to write, .gif or .png.
    sampler
        How to follow the flow: euler, or heun, which takes two velocities a step.
    sample_steps
        Steps from noise to clip.
    guidance
        How far to go beyond what is drawn without a caption; 1 is off.
    data
        Folders, .jsonl or video files; default handwritten digits that move.
    held_out
        Path, share or number of videos to measure on; default a tenth.
    size
        Pixels a side of a clip; default 16.
    frames
        Frames of a clip; default 8.
    channels
        1 for grey (the default), 3 for colour.
    caption_ids
        Ids of a caption, the end among them; default 16 for the digits, else 64.
    steps
        Optimizer steps of the flow, or of the one --task; default 400 (codec: 300).
    codec_steps
        Optimizer steps of the autoencoder that goes ahead of the flow; default 300, or 10 times --steps
        where that is fewer.
    batch
        Clips per micro-batch; default 32.
    accum
        Micro-batches per step.
    dim
        Width of the autoencoder and of the flow's head, a multiple of 32; default 160.
    layers
        Blocks of the flow's head; default 4.
    patch
        Pixels a side of a position of the latents; default 4.
    stride
        Frames of a position of the latents; default 2.
    autoencoder
        Folder or hub name of a pretrained AutoencoderKL of 16 channels, such as FLUX's, to use as it is, on
        each frame, in place of one that is trained.
    state
        What training keeps: full 2.3, compact 1.8 or lean 1.2 bytes a weight.
    lr
        Peak learning rate in trits per step; default by state, half of that for the flow.
    seed
        Seed of weights, data order, noise and rounding.
    device
        Where to compute; default auto.
    eval_steps
        Held-out clips per evaluation during training.
    eval_interval
        Steps between evaluations; 0 is at the end only.
    save_interval
        Steps between checkpoints; 0 is at the end only.
    log_interval
        Steps between readings of the loss from the device.
    no_save
        Write no checkpoints at all.
    """
    if sample is not None:
        if task is not None or resume or data is not None or autoencoder is not None:
            raise UserError("--sample draws with a trained run: give it without training")
        return _sample(run, sample, count, out, steps=sample_steps, sampler=sampler, guidance=guidance,
                       seed=seed, device=device or "auto")  # fmt: skip
    if size == 0:
        raise UserError("--size 0: a clip has one pixel or more")
    given = {
        "data": data,
        "held_out": held_out,
        "video_task": task,
        "video_size": size,
        "video_frames": frames,
        "video_channels": channels,
        "video_ids": caption_ids,
        "video_dim": dim,
        "video_layers": layers,
        "video_patch": patch,
        "video_stride": stride,
        "autoencoder": autoencoder,
        "steps": steps,
        "batch": batch,
        "accum": accum,
        "state": state,
        "lr": lr,
        "seed": seed,
        "device": device,
        "eval_steps": eval_steps,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
        "log_interval": log_interval,
        "save": False if no_save else None,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if autoencoder is not None and task == "codec":
        raise UserError("--autoencoder brings an autoencoder, and --task codec trains one: give one of them")
    if codec_steps is not None and (task or base or resume or autoencoder):
        raise UserError("--codec-steps is of an autoencoder that goes ahead of the flow: leave it out")
    from arbitor.train.session import start_training

    if resume:
        return start_training(settings, preset=preset, run=run, resume=True, reset=reset, flags=FLAGS)
    if task is None and autoencoder is not None:
        print("arbitor: note: --autoencoder is used as it is: only the flow is trained", file=sys.stderr)
    elif task is None and base is None:
        if no_save:
            raise UserError("--no-save: the flow begins with the autoencoder's checkpoint; leave it out")
        return _train_both(settings, preset, run, reset, codec_steps)
    settings = _defaults({"video_task": "flow", **settings}, base, preset)
    return start_training(settings, preset=preset, run=run, reset=reset, base=base, flags=FLAGS)


def _defaults(settings: dict[str, Any], base: str | None, preset: str | None) -> dict[str, Any]:
    """The settings of one task, with what follows from the data and the task.

    Raises:
        UserError: the base has no autoencoder to draw with.
    """
    from arbitor.config import load_config
    from arbitor.config import preset as preset_config
    from arbitor.ternary.optimizer import STATES
    from arbitor.train import runs

    if base is None:
        start = preset_config(preset or "tiny")
    else:
        start = load_config(runs.find_checkpoint(base) / runs.CONFIG_FILE)
    flow = settings["video_task"] == "flow"
    rate = STATES[settings.get("state", start.train.state)].lr
    usual: dict[str, Any] = {
        "steps": FLOW_STEPS if flow else CODEC_STEPS,
        "lr": rate * FLOW_RATE if flow else rate,
    }
    if base is None or not start.model.video_size:
        from arbitor.config import VIDEO_SIZE
        from arbitor.train.learnt import refusal_of_base

        if base is not None and flow and not {"video_size", "autoencoder"} & settings.keys():
            raise UserError(refusal_of_base(base, "flow", "autoencoder"))
        usual |= {"video_size": VIDEO_SIZE, "batch": BATCH}
        if settings.get("data"):
            usual["video_ids"] = CAPTION_IDS
    if base is None and flow and "autoencoder" not in settings:
        print(
            "arbitor: note: without --base the autoencoder stays as it was drawn, which is enough to try "
            "only: train one with --task codec first, or leave --task out",
            file=sys.stderr,
        )
    return usual | settings


def _train_both(
    settings: dict[str, Any], preset: str | None, run: str | None, reset: bool, codec_steps: int | None
) -> int:
    """The autoencoder, then the flow on its latents; returns the exit code of the last that ran."""
    from arbitor.train import runs
    from arbitor.train.metrics import refuse_busy
    from arbitor.train.session import FAILED, start_training

    if run is None:
        if reset:
            raise UserError("--reset deletes a run and starts it anew: name it with --run")
        run = _free_name(preset or "tiny")
    elif reset and runs.run_path(run).exists():
        refuse_busy(runs.run_path(run))
    else:
        runs.refuse_existing(run)
    codec = f"{run}-codec"
    ahead = {name: value for name, value in settings.items() if name != "steps"}
    if codec_steps is None and "steps" in settings:
        steps = settings["steps"]
        # What is below 1 is refused as it was given.
        codec_steps = min(CODEC_STEPS, steps * CODEC_STEPS_PER_FLOW_STEP if steps > 0 else steps)
    if codec_steps is not None:
        ahead["steps"] = codec_steps
    ahead = _defaults({"video_task": "codec", **ahead}, None, preset)
    code = start_training(ahead, preset=preset, run=codec, reset=reset, show_next=False, flags=FLAGS)
    if code not in (0, FAILED):  # a signal, after which the autoencoder's own run can be gone on with
        done = f" and {runs.run_path(run)} is deleted" if runs.run_path(run).exists() else ""
        print(
            f"arbitor: note: the flow is yet to be trained; once the autoencoder is finished{done}, start it "
            f"with: {_flow_command(settings, run, codec)}",
            file=sys.stderr,
        )
    if code:
        return code
    if reset and runs.run_path(run).exists():
        runs.remove_run(runs.run_path(run))
    behind = _defaults({"video_task": "flow", **settings}, codec, None)
    return start_training(behind, run=run, base=codec, flags=FLAGS)


def _flow_command(settings: dict[str, Any], run: str, codec: str) -> str:
    """A command line that trains the flow behind its autoencoder, whose run has all other settings."""
    words = ["arbitor", "diffusion", "--task", "flow", "--base", codec, "--run", run]
    for name in ("steps", "lr", "held_out", "data"):
        if name in settings:
            value = settings[name]
            words += [flag_of(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _free_name(preset: str) -> str:
    """`<preset>-<number>`, which neither a run nor an autoencoder ahead of one has."""
    from arbitor.train import runs

    number = 1
    while any(runs.run_path(f"{preset}-{number}{end}").exists() for end in ("", "-codec")):
        number += 1
    return f"{preset}-{number}"


def _sample(
    run: str | None, captions: Sequence[str], count: int, out: str, *, device: str, **settings: Any
) -> int:
    """Draw clips with a run's best checkpoint and write them; returns the exit code."""
    from arbitor.data.video import write_clips
    from arbitor.drawing import autoencoder_of, draw
    from arbitor.verbs import find_model

    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}")
    if not out.lower().endswith((".gif", ".png")):
        raise UserError(f"--out must end in .gif or .png, got {out!r}")
    source = find_model(run, None, ("flow",))
    model = source.open(device)
    autoencoder_of(model)
    texts = [text.encode("utf-8", "surrogateescape") for text in captions for _ in range(count)]
    with naming_flags(("guidance", "seed")):
        clips = draw(model, texts, **settings).numpy()
    write_clips(out, clips)
    print(f"{out}: {len(clips)} clips of {clips.shape[1]} frames, from {source}")
    return 0


def main(tokens: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return cli.main(["diffusion", *tokens])
