"""`arbitor pretrain`, the command behind `training/pretrain.py`: what is heavy is imported inside it."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from arbitor import cli
from arbitor.cli import DATA, LOGGING, RUN, TRAINING, whole
from arbitor.config import MIXED, RunConfig, load_config, written_settings
from arbitor.errors import UserError
from arbitor.flags import PartFlags, base_config, flag_of, put_usual

# Media, with the settings of a model that has no part for them.
WITHOUT: dict[str, dict[str, Any]] = {
    "image": {"image_size": 0, "image_encoder": ""},
    "audio": {"audio_rate": 0},
    "video": {"video_size": 0},
}
DEFAULT_WEIGHTS = {"text": 4.0, "code": 4.0, "image": 1.0, "audio": 1.0, "video": 1.0}
ENABLED_BY = {"image": "--enable-vision", "audio": "--enable-audio"}
SHOWN_AS = {"image": "images", "audio": "sounds"}
CAPTION_IDS = 64  # of captions of one's own videos; the names of digits are shorter


def pretrain(
    *,
    run: Annotated[str | None, Parameter(group=RUN)] = None,
    resume: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    reset: Annotated[bool, Parameter(group=RUN, show_default=False)] = False,
    base: Annotated[str | None, Parameter(group=RUN)] = None,
    preset: Annotated[str | None, Parameter(group=RUN)] = None,
    config: Annotated[str | None, Parameter(group=RUN)] = None,
    text_data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    code_data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    image_data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    audio_data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    video_data: Annotated[list[str] | None, Parameter(group=DATA, consume_multiple=1)] = None,
    text_weight: Annotated[float | None, Parameter(group=DATA)] = None,
    code_weight: Annotated[float | None, Parameter(group=DATA)] = None,
    image_weight: Annotated[float | None, Parameter(group=DATA)] = None,
    audio_weight: Annotated[float | None, Parameter(group=DATA)] = None,
    video_weight: Annotated[float | None, Parameter(group=DATA)] = None,
    held_out: Annotated[str | None, Parameter(group=DATA)] = None,
    field: Annotated[str | None, Parameter(group=DATA)] = None,
    audio_seconds: Annotated[float | None, Parameter(group=DATA)] = None,
    preserve_state: Annotated[bool, Parameter(group=DATA, show_default=False)] = False,
    no_augment: Annotated[bool, Parameter(group=DATA, show_default=False)] = False,
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
    enable_audio: Annotated[bool, Parameter(group=TRAINING, show_default=False)] = False,
    image_size: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    image_patch: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    image_channels: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    image_encoder: Annotated[str | None, Parameter(group=TRAINING)] = None,
    video_size: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    video_frames: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
    video_channels: Annotated[int | None, Parameter(group=TRAINING, converter=whole)] = None,
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
    """Train one model on text, code, images, sounds and videos by weights; without flags on embedded data.

    Parameters
    ----------
    run
        Name of the run, a folder under ./runs; default <preset>-1, -2, ... (with --resume: the newest).
    resume
        Go on with the run from its latest checkpoint, with its settings; a weight above 0 for images, sounds
        or videos that it has no part for makes a new run that starts from it.
    reset
        Delete the run of that name and start it anew.
    base
        Run or checkpoint to start from; a codec and an autoencoder that it has stay as they are.
    preset
        Settings to start from; default tiny.
    config
        TOML file laid over the preset; flags override it.
    text_data
        Files, folders, globs, or a data set of the hub, hf:NAME[:SPLIT[:FIELD]]; default the docstrings of
        Python's standard library.
    code_data
        The same; default the standard library's sources.
    image_data
        Folders of images with captions, .jsonl or IDX files, or a data set of the hub; default scikit-learn's
        handwritten digits.
    audio_data
        Folders, .tar archives, .jsonl or audio files, or a data set of the hub; default synthesised sounds.
    video_data
        Folders of videos with captions, .jsonl or video files; default digits that move.
    text_weight
        How often text is drawn, relative to the other weights; default 4, 0 leaves it out.
    code_weight
        The same for source code; default 4.
    image_weight
        The same for images; default 1. With 0 the model has no part for images.
    audio_weight
        The same for sounds; default 1. With 0 the model has no part for sounds.
    video_weight
        The same for videos; default 1. With 0 the model has no part for videos.
    held_out
        Share of the data of every modality to measure on.
    field
        Field that holds the text in .jsonl files; default text.
    audio_seconds
        Longest sound; what follows is cut off. Default 1.
    preserve_state
        Read text and code as consecutive windows, each with the KV ledger of the one before it.
    no_augment
        Do not shift and turn the images.
    steps
        Optimizer steps; with --resume, more than the run has.
    batch
        Windows, images, recordings or clips per micro-batch.
    accum
        Micro-batches per step; each is of one modality.
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
        Draw images: their usual weight, where none is given and the config file or the run has 0.
    enable_audio
        The same for sounds.
    image_size
        Pixels a side that every image is fitted into; default by the data, else 224.
    image_patch
        Pixels a side of a patch; default by the data, else 16.
    image_channels
        1 for grey, 3 for colour; default by the data, else 3.
    image_encoder
        Folder or hub name of a DINOv2 that stands frozen, in int8, ahead of the patch embedding.
    video_size
        Pixels a side of a clip; default 16.
    video_frames
        Frames of a clip; default 8.
    video_channels
        1 for grey (the default), 3 for colour.
    max_moe_iters
        Most iterations of the core.
    state
        What training keeps: full 2.3, compact 1.8 or lean 1.2 bytes a weight.
    rule
        Direction of the votes.
    lr
        Peak learning rate in trits per step; default by state.
    accum_threshold
        Accumulator value at which a trit flips; default by state.
    e_accum_threshold
        Accumulator value at which a scale exponent moves.
    scale_lr
        Strength of the votes on scale exponents; 0 freezes them.
    seed
        Seed of weights, data order, the mix and rounding.
    device
        Where to compute; default auto.
    eval_steps
        Held-out windows, images, recordings and clips per evaluation during training.
    eval_interval
        Steps between evaluations; 0 is at the end only.
    save_interval
        Steps between checkpoints; 0 is at the end only.
    no_save
        Write no checkpoints at all.
    log_interval
        Steps between readings of the loss from the device.
    """
    given = {
        "text_data": text_data,
        "code_data": code_data,
        "image_data": image_data,
        "audio_data": audio_data,
        "video_data": video_data,
        "text_weight": text_weight,
        "code_weight": code_weight,
        "image_weight": image_weight,
        "audio_weight": audio_weight,
        "video_weight": video_weight,
        "preserve_state": preserve_state or None,
        "held_out": held_out,
        "field": field,
        "augment": False if no_augment else None,
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
        "log_interval": log_interval,
        "encoder": image_encoder,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    sizes = {"image_size": image_size, "image_patch": image_patch, "image_channels": image_channels}
    image: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if image_encoder is not None:
        image = {"image_encoder": image_encoder, **image}
    clips = {"video_size": video_size, "video_frames": video_frames, "video_channels": video_channels}
    video: dict[str, Any] = {name: value for name, value in clips.items() if value is not None}
    parts = PartFlags(
        without=cli.left_out(moe=disable_moe, vq=disable_vq, graph=disable_graph),
        memory=enable_memory,
        memory_rows=memory_rows,
        max_moe_iters=max_moe_iters,
    )
    enabled = [name for name, on in (("image", enable_vision), ("audio", enable_audio)) if on]
    return start_mix(
        settings,
        parts,
        image=image,
        video=video,
        audio_seconds=audio_seconds,
        enabled=enabled,
        run=run,
        resume=resume,
        reset=reset,
        base=base,
        preset=preset,
        config=config,
    )


def start_mix(
    settings: dict[str, Any],
    parts: PartFlags,
    *,
    image: Mapping[str, Any],
    video: Mapping[str, Any] | None = None,
    audio_seconds: float | None = None,
    enabled: Collection[str] = (),
    only: bool = False,
    run: str | None,
    resume: bool,
    reset: bool,
    base: str | None = None,
    preset: str | None,
    config: str | None,
) -> int:
    """Train a mixed run, new, resumed or grown; returns the exit code.

    Args:
        settings: given by flags, without those of parts and media; added to.
        parts: the flags of the model's parts.
        image, video: settings of the media that were given by flags.
        audio_seconds: longest sound, if that was given.
        enabled: media that shall be drawn whatever the config file or the run says.
        only: draw text and these media alone, unless the config file or the run says more, and say so; what
            `arbitor train` does where several media are enabled.
        run, resume, reset, base, preset, config: flags of that name.

    Raises:
        UserError: anything given that cannot be used.
    """
    video = video or {}
    before = _before(run, resume, base)
    start = base_config(preset, config) if before is None else before
    written = {} if before is not None or config is None else written_settings(config)
    usual = _usual_weights(before, resume, written)
    if only:
        _refuse_no_mix(settings, enabled, start, run, resume)
        usual |= {name: start.mix.weight(name) for name in MIXED if name != "text" and name not in enabled}
    weights = _weights(settings, usual, enabled)
    if image and not weights["image"]:
        raise UserError(f"{flag_of(next(iter(image)))} is for images: give --image-weight as well")
    if image.get("image_size") == 0 and "image" in enabled:
        raise UserError("--enable-vision asks for images and --image-size 0 for none: give one of them")
    if video and not weights["video"]:
        raise UserError(f"{flag_of(next(iter(video)))} is for videos: give --video-weight as well")
    if video.get("video_size") == 0:
        raise UserError("--video-size 0: a clip has one pixel or more; --video-weight 0 leaves videos out")
    if settings.get("preserve_state") and not (weights["text"] or weights["code"]):
        raise UserError("--preserve-state is for text and code: give --text-weight or --code-weight as well")
    if audio_seconds is not None and not weights["audio"]:
        raise UserError("--audio-seconds is for sounds: give --audio-weight as well")

    if before is None:
        cli._print_notes(parts.notes(start.model))
    elif resume:
        parts.refuse_contradiction(start.model, "the run's config.toml")
    settings |= parts.settings(start.model)
    grows = _sidecars(settings, weights, start, written, before is None, image, audio_seconds, video)
    if resume and not grows:
        _refuse_no_growth(run, start, audio_seconds, settings)
    if before is None or base is not None or grows:
        settings |= {f"{name}_weight": weight for name, weight in weights.items()}
        settings.setdefault("output_router", True)
        settings.setdefault("train_codec", not (before is not None and before.model.audio_rate))
        settings.setdefault("train_autoencoder", not (before is not None and before.model.video_size))
    if only:
        mix = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)
        line = f"{_flags_of(enabled)} train one model on a mix, with the weights {mix}"
        cli._print_notes([f"{line}; `arbitor pretrain` takes others"])
    if "field" in settings and not any(
        settings.get(key) or getattr(start.mix, key) for key in ("text_data", "code_data", "image_data")
    ):
        from arbitor.data.contents import unused_field

        cli._print_notes([unused_field(settings["field"])])

    from arbitor.train.session import start_training

    return start_training(
        settings, preset=preset, config_file=config, run=run, resume=resume, reset=reset, base=base
    )


def _refuse_no_mix(
    settings: Mapping[str, Any], enabled: Collection[str], start: RunConfig, run: str | None, resume: bool
) -> None:
    """Raise UserError where flags of `arbitor train` do not say what a mix is to be made of.

    Args:
        settings: given by flags.
        enabled: media that are asked for beside text.
        start: settings of the run that is resumed, or of preset and config file.
        run, resume: flags of that name.
    """
    flags = _flags_of(enabled)
    if start.mix.active and "data" not in settings:
        return
    data = "--data" if "data" in settings else "its data" if resume else "data of the config file"
    if "data" in settings or start.data.data:
        each = ", ".join(f"--{name}-data" for name in ("text", *enabled))
        raise UserError(
            f"{flags}: text and media are drawn by turns, each from data of its own, which {data} cannot "
            f"tell apart; `arbitor pretrain` takes {each}"
        )
    if resume and all(getattr(start.model, next(iter(WITHOUT[name]))) for name in enabled):
        from arbitor.train import runs

        name = runs.existing_run(run).name
        raise UserError(
            f"{flags}: the run {name!r} has these parts and is not mixed; a mixed run that starts from it is "
            f"made by: arbitor pretrain --base {shlex.quote(name)} --code-weight 0 --video-weight 0"
        )


def _flags_of(enabled: Collection[str]) -> str:
    return " and ".join(ENABLED_BY[name] for name in enabled)


def _before(run: str | None, resume: bool, base: str | None) -> RunConfig | None:
    """Settings of the run that is gone on with or grown from; None for a new one.

    Raises:
        UserError: there is none, or both flags were given.
    """
    if resume and base is not None:
        raise UserError("--resume goes on with a run and --base starts from another: give one of them")
    if not resume and base is None:
        return None
    from arbitor.train import runs

    folder = runs.existing_run(run) if resume else runs.find_checkpoint(base)
    return load_config(folder / runs.CONFIG_FILE)


def _refuse_no_growth(
    run: str | None, config: RunConfig, audio_seconds: float | None, settings: Mapping[str, Any]
) -> None:
    """Raise UserError if a run that is resumed as it is has no mix, or other sounds than those asked for."""
    if not config.mix.active:
        from arbitor.train import runs

        name = runs.existing_run(run).name
        raise UserError(
            f"the run {name!r} is not mixed, and no weight asks for a part that it has not: give one, such "
            f"as --image-weight 1, or go on with it by: arbitor train --resume --run {shlex.quote(name)}"
        )
    model = config.model
    if audio_seconds is not None and settings["audio_samples"] != model.audio_samples:
        raise UserError(
            f"--audio-seconds {audio_seconds:g} contradicts the run's "
            f"{model.audio_samples / model.audio_rate:g}; leave it out to resume, or start a new run"
        )


def _usual_weights(before: RunConfig | None, resume: bool, written: Mapping[str, Any]) -> dict[str, float]:
    """The weight of every modality without a flag.

    Args:
        before: the run that is gone on with or grown from, or None.
        resume: it is gone on with; one that is not mixed grows by the media that are asked for alone.
        written: settings of the config file. Weights that are all 0 are those of a run that is not mixed.
    """
    if before is not None and before.mix.active:
        return {name: before.mix.weight(name) for name in MIXED}
    if resume:
        return DEFAULT_WEIGHTS | dict.fromkeys(WITHOUT, 0.0)
    given = {name: float(written[key]) for name in MIXED if (key := f"{name}_weight") in written}
    return DEFAULT_WEIGHTS | (given if len(given) < len(MIXED) or any(given.values()) else {})


def _weights(
    settings: Mapping[str, Any], usual: Mapping[str, float], enabled: Collection[str]
) -> dict[str, float]:
    """The weight of every modality: those given, over the usual ones.

    Args:
        settings: given by flags.
        usual: see `_usual_weights`.
        enabled: media that have their default weight where the usual one is 0.

    Raises:
        UserError: one that is negative or no number, or 0 for what is enabled, or all are 0.
    """
    usual = {**usual, **{name: DEFAULT_WEIGHTS[name] for name in enabled if not usual[name]}}
    weights = {}
    for name in enabled:
        if settings.get(f"{name}_weight") == 0:
            raise UserError(
                f"{ENABLED_BY[name]} asks for {SHOWN_AS[name]} and --{name}-weight 0 for none: give one of "
                "them"
            )
    for name in MIXED:
        weights[name] = float(settings.get(f"{name}_weight", usual[name]))
        if not 0.0 <= weights[name] < float("inf"):
            raise UserError(f"--{name}-weight must be 0 or a number above, got {weights[name]:g}")
    if not any(weights.values()):
        raise UserError("all weights are 0, so there is nothing to learn from; give one above 0")
    from arbitor.data.mixed import OPENERS

    for name, weight in weights.items():
        if weight and name not in OPENERS:
            raise UserError(
                f"--{name}-weight {weight:g}: this version cannot mix {name}; leave it out "
                f"(it mixes {', '.join(OPENERS)})"
            )
        if f"{name}_data" in settings and not weight:
            raise UserError(f"--{name}-data is given and --{name}-weight is 0: give a weight as well")
    return weights


def _sidecars(
    settings: dict[str, Any],
    weights: Mapping[str, float],
    start: RunConfig,
    written: Mapping[str, Any],
    new: bool,
    image: Mapping[str, Any],
    audio_seconds: float | None,
    video: Mapping[str, Any],
) -> bool:
    """Put the fields of the sidecars that the weights ask for into `settings`; whether one is new.

    Args:
        settings: given by flags, without those of the media; added to.
        weights: of all modalities.
        start: of the run before, or preset and config file of a new one.
        written: settings of the config file.
        new: there is no run before.
        image, audio_seconds, video: what was given by flags.

    Raises:
        UserError: data that cannot be used.
    """
    grows = False
    usual: dict[str, Any] = {}
    model, mix = start.model, start.mix
    if source := image.get("image_encoder"):
        from arbitor.sidecars.encoder import geometry_of, read_architecture

        architecture = read_architecture(source)
        image = {**image, "image_encoder": architecture}
        usual = geometry_of(architecture)
    settings.update(image)
    if weights["image"] and not model.image_size:
        from arbitor.config import IMAGE_SIZE
        from arbitor.data.images import default_geometry

        grows = True
        usual = usual or default_geometry(settings.get("image_data", mix.image_data))
        put_usual(settings, {"image_size": IMAGE_SIZE, **usual}, written, "image_size")
    rate = model.audio_rate
    if weights["audio"] and (new or not rate):
        from arbitor.data.audio import default_rate

        grows = True
        rate = rate or default_rate(settings.get("audio_data", mix.audio_data))
        put_usual(settings, {"audio_rate": rate, "audio_samples": rate}, written, "audio_rate")
    if audio_seconds is not None:
        if not 0.05 <= audio_seconds <= 3600:
            raise UserError(f"--audio-seconds must be between 0.05 and 3600, got {audio_seconds:g}")
        settings["audio_samples"] = round(audio_seconds * rate)
    settings.update(video)
    if weights["video"] and (new or not model.video_size):
        from arbitor.config import VIDEO_SIZE

        grows = True
        usual = {"video_size": VIDEO_SIZE}
        if settings.get("video_data", mix.video_data):
            usual["video_ids"] = CAPTION_IDS
        put_usual(settings, usual, written, "video_size")
    if new:  # what is not drawn is not built, whatever sizes the file says
        for name, without in WITHOUT.items():
            if not weights[name]:
                settings.update(without)
    return grows


def main(tokens: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return cli.main(["pretrain", *tokens])
