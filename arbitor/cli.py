"""The command `arbitor`: one function a verb; what a verb needs is imported inside it, torch above all."""

import errno
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter, Token, UnusedCliTokensError

from arbitor import __version__
from arbitor.errors import UserError

if TYPE_CHECKING:
    from arbitor.flags import PartFlags

USER_ERROR = 2
BUG = 1
INTERRUPTED = 130  # 128 plus the number of SIGINT, as shells have it
NO_MEMORY = "can't allocate memory"  # what torch says of a CPU's
VISION_BATCH = 64  # the captions of 16 images, the batch of texts, are few bytes to learn from

app = App(
    name="arbitor",
    help="Train models of trits times powers of two (byte tables: int8), in integer state throughout.",
    help_epilogue="`arbitor VERB --help` lists the flags of a verb; --debug shows the traceback of an error.",
    version=f"arbitor {__version__}",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,  # `main` says a line
)

# What scripts in `training/` run, from any folder; imported when asked for.
for _name, _module, _help in (
    ("audio", "audio_command", "Train an audio codec, or a model that listens or speaks; or try one."),
    ("diffusion", "video_command", "Train an autoencoder of clips and a flow of its latents; or draw clips."),
    ("pretrain", "pretrain_command", "Train one model on text, code, images, sounds and videos by weights."),
):
    app.command(f"arbitor.{_module}:{_name}", name=_name, help=_help)

RUN = Group("Run", sort_key=0)
DATA = Group("Data", sort_key=1)
TRAINING = Group("Model and training", sort_key=2)
LOGGING = Group("Evaluation, saving, logging", sort_key=3)


def whole(_: object, tokens: Sequence[Token]) -> int:
    """An integer as it is written; without this, 1.5 steps would be 2."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


Count = Annotated[int, Parameter(converter=whole)]
Device = Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="Where to compute.")]
Checkpoint = Annotated[
    str | None,
    Parameter(
        help="Name of a run (its best checkpoint is taken), or a checkpoint's path; default the newest run "
        "that has learnt what is asked for."
    ),
]
Adapter = Annotated[
    str | None,
    Parameter(
        help="Name of a finetune, or an adapter's folder; without a checkpoint, its own base is taken."
    ),
]


@app.command(sort_key=0)
def train(
    *,
    run: Annotated[str | None, Parameter(group=RUN)] = None,
    resume: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    reset: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    preset: Annotated[str | None, Parameter(group=RUN)] = None,
    config: Annotated[str | None, Parameter(group=RUN)] = None,
    data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    held_out: Annotated[str | None, Parameter(group=DATA)] = None,
    field: Annotated[str | None, Parameter(group=DATA)] = None,
    steps: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    batch: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    accum: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    ctx: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    disable_moe: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    disable_vq: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    disable_graph: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    enable_memory: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    memory_rows: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    enable_vision: Annotated[
        bool, Parameter(name=("--enable-vision", "--enable-image"), group=TRAINING, show_default=False)
    ] = False,
    image_size: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    image_patch: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    image_channels: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    image_encoder: Annotated[str | None, Parameter(group=TRAINING)] = None,
    no_augment: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    enable_audio: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    max_moe_iters: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    state: Annotated[Literal["full", "compact", "lean"] | None, Parameter(group=TRAINING)] = None,
    rule: Annotated[Literal["spectral", "sinkhorn", "row", "sign"] | None, Parameter(group=TRAINING)] = None,
    lr: Annotated[float | None, Parameter(group=TRAINING)] = None,
    accum_threshold: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    e_accum_threshold: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    scale_lr: Annotated[float | None, Parameter(group=TRAINING)] = None,
    seed: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, Parameter(group=TRAINING)] = None,
    eval_steps: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    eval_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    save_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
    no_save: Annotated[bool, Parameter(group=LOGGING, show_default=False)] = False,
    log_interval: Annotated[int | None, Parameter(group=LOGGING, converter=whole)] = None,
) -> int:
    """Train a model; without flags a tiny one on the Python standard library's sources.

    Parameters
    ----------
    run
        Name of the run, a folder under ./runs; default <preset>-1, -2, ... (with --resume: the newest).
    resume
        Go on with the run from its latest checkpoint, with its settings; a larger --steps trains it longer,
        --enable-vision makes a new run that starts from it.
    reset
        Delete the run of that name and start it anew.
    preset
        Settings to start from: tiny (default; a minute or so on two cores, 0.5 GB), small (2.3 GB; half a
        minute for each of 1,000 steps on one core), or, for a GPU, base, arb-small or arb-1b.
    config
        TOML file laid over the preset; flags override it.
    data
        Files, folders or globs to train on, runs left out; default the standard library's sources.
    held_out
        Path, or share of the data, to measure on.
    field
        Field that holds the text in .jsonl files; default text.
    steps
        Optimizer steps; with --resume, more than the run has.
    batch
        Windows per micro-batch.
    accum
        Micro-batches per step.
    ctx
        Context length in bytes.
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
    enable_vision
        Learn captions of images: --data names folders of images with .txt captions, .jsonl or IDX files;
        default scikit-learn's handwritten digits. Without --preset, a step takes 64 of them.
    image_size
        Pixels a side that every image is fitted into; default by the data, else 224.
    image_patch
        Pixels a side of a patch, which is one position; default by the data, else 16.
    image_channels
        1 for grey, 3 for colour; default by the data, else 3.
    image_encoder
        Folder or hub name of a DINOv2 that stands frozen, in int8, ahead of the patch embedding.
    no_augment
        Do not shift and turn the images.
    enable_audio
        Learn the labels of recordings: --data names folders, .tar archives, .jsonl or audio files; default
        synthesised sounds. `arbitor audio` has more: the codec, speaking. With --enable-vision as well, one
        model learns from text, images and sounds, drawn by weights: `arbitor pretrain` has more of that.
    max_moe_iters
        Most iterations of the core.
    state
        What training keeps: full 2.3, compact 1.8 or lean 1.2 bytes a weight.
    rule
        Direction of the votes.
    lr
        Peak learning rate in trits per step; default by state and steps.
    accum_threshold
        Accumulator value at which a trit flips; default by state.
    e_accum_threshold
        Accumulator value at which a scale exponent moves.
    scale_lr
        Strength of the votes on scale exponents; 0 freezes them.
    seed
        Seed of weights, data order and rounding.
    device
        Where to compute; default auto.
    eval_steps
        Held-out windows per evaluation during training.
    eval_interval
        Steps between evaluations; 0 is at the end only.
    save_interval
        Steps between checkpoints; 0 is at the end only.
    no_save
        Write no checkpoints at all.
    log_interval
        Steps between readings of the loss from the device; every step gets its line in metrics.jsonl.
    """
    given = {
        "data": data,
        "held_out": held_out,
        "field": field,
        "steps": steps,
        "batch": batch,
        "accum": accum,
        "ctx": ctx,
        "state": state,
        "rule": rule,
        "lr": lr,
        "accum_threshold": accum_threshold,
        "e_accum_threshold": e_accum_threshold,
        "scale_lr": scale_lr,
        "seed": seed,
        "device": device,
        "eval_steps": eval_steps,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
        "save": False if no_save else None,
        "augment": False if no_augment else None,
        "encoder": image_encoder,
        "log_interval": log_interval,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    without = left_out(moe=disable_moe, vq=disable_vq, graph=disable_graph)
    sizes = {"image_size": image_size, "image_patch": image_patch, "image_channels": image_channels}
    image: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    numbers = memory_rows is not None or max_moe_iters is not None
    if image_encoder is not None and not enable_vision:
        raise UserError("--image-encoder is for images: give --enable-vision as well")
    if enable_vision and enable_audio:
        from arbitor.flags import PartFlags
        from arbitor.pretrain_command import start_mix

        return start_mix(
            settings,
            PartFlags(
                without=without, memory=enable_memory, memory_rows=memory_rows, max_moe_iters=max_moe_iters
            ),
            image=image if image_encoder is None else {"image_encoder": image_encoder, **image},
            enabled=("image", "audio"),
            only=True,
            run=run,
            resume=resume,
            reset=reset,
            preset=preset,
            config=config,
        )
    if without or enable_memory or numbers or enable_vision or image:
        from arbitor.flags import PartFlags

        image_default: dict[str, Any] = {}
        if enable_vision:
            from arbitor.data.images import default_geometry

            image_default = default_geometry(data or ())
            if image_encoder is not None:
                from arbitor.sidecars.encoder import geometry_of, read_architecture

                architecture = read_architecture(image_encoder)
                image["image_encoder"] = architecture
                image_default = geometry_of(architecture)
        parts = PartFlags(
            without=without,
            memory=enable_memory,
            memory_rows=memory_rows,
            max_moe_iters=max_moe_iters,
            vision=enable_vision,
            image=image,
            image_default=image_default,
        )
        settings |= _part_settings(parts, preset, config, run, resume)
        if enable_vision and batch is None and preset is None and config is None and not resume:
            settings["batch"] = VISION_BATCH  # a run that is resumed or grows keeps its own
    if enable_audio:
        settings |= _audio_settings(data, preset, config, run, resume)
    from arbitor.train.session import start_training

    return start_training(
        settings,
        preset=preset,
        config_file=config,
        run=run,
        resume=resume,
        reset=reset,
    )


def left_out(**off: bool) -> tuple[str, ...]:
    """Names of the parts that flags leave out, as `arbitor.flags.PartFlags` takes them."""
    return tuple(name for name in off if off[name])


def _part_settings(
    parts: "PartFlags",
    preset: str | None,
    config_file: str | None,
    run: str | None,
    resume: bool,
    base: str | None = None,
) -> dict[str, Any]:
    """What the flags of parts set in a new run, which may start from the run `base`; those that contradict a
    resumed one are refused.
    """
    from arbitor.config import load_config
    from arbitor.flags import base_model

    if resume:
        from arbitor.train import runs

        path = runs.existing_run(run) / runs.CONFIG_FILE
        model = load_config(path).model
        parts.refuse_contradiction(model, str(path))
    else:
        if base is None:
            model = base_model(preset, config_file)
        else:
            from arbitor.train import runs

            model = load_config(runs.find_checkpoint(base) / runs.CONFIG_FILE).model
        _print_notes(parts.notes(model))
    return parts.settings(model)


def _audio_settings(
    data: list[str] | None, preset: str | None, config_file: str | None, run: str | None, resume: bool
) -> dict[str, Any]:
    """What --enable-audio sets: listening; nothing in a resumed run that has it."""
    from arbitor.config import load_config, written_settings
    from arbitor.data.audio import default_rate
    from arbitor.flags import base_config, put_usual

    rate = 0
    named: Sequence[str] = data or ()
    written: dict[str, Any] = {}
    if resume:
        from arbitor.train import runs

        if load_config(runs.existing_run(run) / runs.CONFIG_FILE).model.audio_rate:
            return {}
    elif config_file is not None:
        base = base_config(preset, config_file)
        rate, named, written = base.model.audio_rate, data or base.data.data, written_settings(config_file)
    rate = rate or default_rate(named)
    settings: dict[str, Any] = {"audio_task": "listen"}
    put_usual(settings, {"audio_rate": rate, "audio_samples": rate}, written, "audio_rate")
    return settings


def _print_notes(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"arbitor: note: {line}", file=sys.stderr)


@app.command(sort_key=1)
def generate(
    checkpoint: Checkpoint = None,
    /,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    image: str | None = None,
    adapter: Adapter = None,
    max_bytes: Annotated[int, Parameter(name="--bytes", converter=whole)] = 400,
    temperature: float = 0.8,
    top_k: Count = 0,
    top_p: float = 1.0,
    seed: Annotated[int | None, Parameter(converter=whole)] = None,
    device: Device = "auto",
) -> int:
    """Continue a text with a trained model, byte by byte.

    Parameters
    ----------
    prompt
        Text to go on from.
    image
        File of an image that stands ahead of the text, for a model that was trained with --enable-vision.
    max_bytes
        Bytes to generate at most.
    temperature
        Below 1 safer, above 1 wilder; 0 takes the likeliest byte always.
    top_k
        Draw among the k likeliest bytes only; 0 is off.
    top_p
        Draw among the likeliest bytes that together have this probability; 1 is off.
    seed
        Equal seeds give equal text; default a fresh one.
    """
    from arbitor.verbs import generate_text

    return generate_text(
        checkpoint,
        prompt.encode("utf-8", "surrogateescape"),
        max_bytes,
        image=image,
        adapter=adapter,
        device=device,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


@app.command(sort_key=1)
def chat(
    checkpoint: Annotated[
        str | None,
        Parameter(
            help="Name of a run or finetune, or a checkpoint's path; default the newest that has learnt text."
        ),
    ] = None,
    /,
    *,
    adapter: Adapter = None,
    system: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    max_bytes: Annotated[int, Parameter(name="--bytes", converter=whole)] = 400,
    temperature: float = 0.8,
    top_k: Count = 0,
    top_p: float = 1.0,
    seed: Annotated[int | None, Parameter(converter=whole)] = None,
    device: Device = "auto",
) -> int:
    """Talk with a finetuned model; a piped stdin is answered line by line.

    Parameters
    ----------
    system
        Text ahead of the conversation.
    max_bytes
        Bytes of an answer at most.
    temperature
        Below 1 safer, above 1 wilder; 0 takes the likeliest byte always.
    top_k
        Draw among the k likeliest bytes only; 0 is off.
    top_p
        Draw among the likeliest bytes that together have this probability; 1 is off.
    seed
        Equal seeds give equal answers; default a fresh one.
    """
    from arbitor.verbs import chat_with

    return chat_with(
        checkpoint,
        adapter=adapter,
        system=system.encode("utf-8", "surrogateescape"),
        device=device,
        max_bytes=max_bytes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


@app.command(sort_key=3)
def finetune(
    checkpoint: Checkpoint = None,
    /,
    *,
    data: Annotated[list[str] | None, Parameter(consume_multiple=1)] = None,
    held_out: str | None = None,
    enable_vision: Annotated[
        bool, Parameter(name=("--enable-vision", "--enable-image"), show_default=False)
    ] = False,
    enable_audio: Annotated[bool, Parameter(show_default=False)] = False,
    task: Literal["listen", "speak"] | None = None,
    enable_video: Annotated[bool, Parameter(show_default=False)] = False,
    full: Annotated[bool, Parameter(show_default=False)] = False,
    rank: Annotated[int | None, Parameter(name=("--rank", "--lora"), converter=whole)] = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: Annotated[list[str] | None, Parameter(consume_multiple=1)] = None,
    lr: float | None = None,
    state: Literal["full", "compact", "lean"] | None = None,
    steps: Annotated[int | None, Parameter(converter=whole)] = None,
    batch: Annotated[int | None, Parameter(converter=whole)] = None,
    ctx: Annotated[int | None, Parameter(converter=whole)] = None,
    seed: Annotated[int | None, Parameter(converter=whole)] = None,
    eval_interval: Annotated[int | None, Parameter(converter=whole)] = None,
    save_interval: Annotated[int | None, Parameter(converter=whole)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, Parameter()] = None,
    run: str | None = None,
    resume: Annotated[bool, Parameter(show_default=False)] = False,
) -> int:
    """Teach a trained model to answer: float adapters (LoRA) beside frozen trits, or --full.

    Parameters
    ----------
    data
        .jsonl files, folders or globs of conversations; default a small set of tasks made by code.
    held_out
        Path, or share of the conversations, to measure on; default 0.1.
    enable_vision
        The data is images with captions, as in `arbitor train`; default scikit-learn's digits.
    enable_audio
        The data is recordings with their texts, as in `arbitor audio`; default synthesised sounds.
    task
        With --enable-audio: listen (sound to text) or speak (text to sound); default the base's.
    enable_video
        The data is videos with captions, as in `arbitor diffusion`; default digits that move.
    full
        Go on training the trits themselves by votes, without adapters.
    rank
        Rank of the adapters; default 8.
    alpha
        The adapters' update is scaled by alpha / rank; default twice the rank.
    dropout
        Share of the adapters' inputs zeroed in training; default 0.
    targets
        Words of the names of the linears to adapt, such as attention or ffn.up; default all but routers.
    lr
        Peak learning rate; default 0.005 (AdamW), with --full 0.6 of training's.
    state
        What training keeps with --full: full, compact or lean.
    steps
        Optimizer steps; default 400.
    batch
        Conversations, or media, per step; default 16.
    ctx
        Longest conversation in bytes, or sound in samples; default the base's.
    seed
        Seed of adapters, order and rounding; default 0.
    eval_interval
        Steps between evaluations, 0 at the end only; default 100.
    save_interval
        Steps between checkpoints, 0 at the end only; default 100.
    device
        Where to compute; default auto.
    run
        Name of the finetune, a folder under ./runs; default <base>-lora-1, ... (with --resume: the newest).
    resume
        Go on with a finetune from its latest checkpoint, with its own settings.
    """
    from arbitor.finetune.session import start_finetuning

    given = {
        "data": data,
        "held_out": held_out,
        "vision": enable_vision or None,
        "audio": enable_audio or None,
        "audio_task": task,
        "video": enable_video or None,
        "full": full or None,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "targets": targets,
        "lr": lr,
        "state": state,
        "steps": steps,
        "batch": batch,
        "ctx": ctx,
        "seed": seed,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
        "device": device,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    return start_finetuning(settings, checkpoint=checkpoint, run=run, resume=resume)


@app.command(name="eval", sort_key=2)
def evaluate(
    checkpoint: Checkpoint = None,
    /,
    *,
    data: Annotated[list[str], Parameter(consume_multiple=1)],
    field: str | None = None,
    device: Device = "auto",
) -> int:
    """Measure a trained model on a text: bits per byte, over up to 1 MB of it.

    Parameters
    ----------
    data
        Files, folders or globs to measure on.
    field
        Field that holds the text in .jsonl files; default text.
    """
    from arbitor.verbs import evaluate_data

    return evaluate_data(checkpoint, data, field, device)


@app.command(sort_key=3)
def audit(checkpoint: Checkpoint = None, /) -> int:
    """List every tensor that is kept, and fail if one is a float weight or float training state."""
    from arbitor.verbs import audit_tensors

    return audit_tensors(checkpoint)


@app.command(sort_key=5)
def smoke(
    *,
    preset: str = "arb-1b",
    state: Literal["full", "compact", "lean"] = "lean",
    seed: Count = 0,
    device: Device = "auto",
    ctx: Annotated[int | None, Parameter(converter=whole)] = None,
    batch: Count = 1,
    max_moe_iters: Annotated[int | None, Parameter(converter=whole)] = None,
    no_vq: Annotated[bool, Parameter(show_default=False)] = False,
    no_graph: Annotated[bool, Parameter(show_default=False)] = False,
    backward: Annotated[bool, Parameter(show_default=False)] = False,
    warmup: Annotated[bool, Parameter(show_default=False)] = False,
    json: Annotated[bool, Parameter(show_default=False)] = False,
) -> int:
    """Build a model and run it twice on random bytes: weights, state, time, peak memory.

    Parameters
    ----------
    preset
        Settings to build from: tiny, small, base, arb-small or arb-1b.
    state
        What training keeps.
    seed
        Seed of weights, bytes and rounding.
    ctx
        Context length in bytes; default by preset.
    batch
        Windows.
    max_moe_iters
        Most iterations of the core; default by preset.
    no_vq
        Leave motifs out, and the graph with them.
    no_graph
        Leave the motif graph out.
    backward
        Backward and optimizer step as well.
    warmup
        First compile all kernels that a training step of the model needs on this GPU, at once, for this and
        later processes; and measure which are faster, where nobody did (see `arbitor doctor`).
    json
        Print one line of JSON, sizes in bytes and times in seconds.
    """
    from arbitor.flags import PartFlags, naming_flags
    from arbitor.smoke import run

    without = left_out(vq=no_vq, graph=no_graph)
    with naming_flags(("ctx", "batch", "seed", "max_moe_iters")):
        return run(
            preset=preset,
            state=state,
            seed=seed,
            device=device,
            ctx=ctx,
            batch=batch,
            parts=PartFlags(without=without, verb="no", max_moe_iters=max_moe_iters),
            backward=backward,
            warmup=warmup,
            as_json=json,
            note=lambda line: _print_notes([line]),
        )


@app.command(sort_key=4)
def doctor(*, measure: Annotated[bool, Parameter(show_default=False)] = False) -> int:
    """Check this machine: device, versions, memory, disk, and a self-test.

    Parameters
    ----------
    measure
        First measure, in seconds, which kernels this GPU is faster with, and store it for all later runs;
        results do not change.
    """
    from arbitor.doctor import examine

    return examine(measure=measure)


def main(tokens: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        tokens: arguments; None takes the process's own.
    """
    arguments = list(sys.argv[1:] if tokens is None else tokens)
    debug = "--debug" in arguments
    arguments = [token for token in arguments if token != "--debug"]
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:  # of a run that has begun, SignalGuard takes care
        return interrupted()
    except BrokenPipeError:  # the reader of a pipe had enough
        _drop_stdout()
        return 0
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich makes this of it
            return 0
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        if isinstance(error, OSError) and error.filename is None and not _stdout_works():
            _drop_stdout()
            message = f"cannot write to stdout: {error.strerror}"
        print(f"arbitor: error: {message}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def interrupted() -> int:
    """Say so; returns the exit code."""
    print("arbitor: interrupted", file=sys.stderr)
    return INTERRUPTED


def _explain(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code that belongs to it."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}; see --help", USER_ERROR
    if isinstance(error, CycloptsError):
        return _one_line(error), USER_ERROR
    if isinstance(error, UserError):
        return _one_line(error), USER_ERROR
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return f"{error.strerror}: make room, then give the same command again", USER_ERROR
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}", USER_ERROR
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or NO_MEMORY in str(error)
    ):
        return "out of memory; a smaller --batch with a larger --accum needs less", USER_ERROR
    kind = type(error).__name__
    return f"unexpected {kind}: {_one_line(error)} (--debug shows the traceback; please report it)", BUG


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _stdout_works() -> bool:
    """Whether stdout takes a line's end; asked after a write that failed without saying where."""
    try:
        if sys.stdout is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
    except OSError:
        return False
    return True


def _drop_stdout() -> None:
    """Keep the interpreter from complaining at exit that it cannot flush stdout."""
    from arbitor.train.display import drop_output

    drop_output(sys.stdout)
