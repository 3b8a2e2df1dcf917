"""What a run is made of: model, training and data settings, presets, strict TOML reading and exact writing.

Every setting is checked where it is made, so a `RunConfig` that exists can be used; whatever cannot be used
is a `UserError` that names the setting, the value and what is allowed.
"""

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from arbitor import __version__
from arbitor.errors import UserError

STATES = ("lean", "compact", "full")
RULES = ("spectral", "sinkhorn", "row", "sign")
TSCALES = ("T4", "T6", "T8", "T16", "T32", "T64", "T96", "ROW")
DEVICES = ("auto", "cpu", "cuda")
AUDIO_TASKS = ("", "codec", "listen", "speak")
VIDEO_TASKS = ("", "codec", "flow")
MIXED = ("text", "code", "image", "audio", "video")  # what pretraining may mix
LEARNT = ("text", "chat", "image", "codec", "listen", "speak", "autoencoder", "flow")
"""What a run may have learnt; `arbitor.train.learnt.WORDS` says what each is."""
RUNS = Path("runs")  # where runs are written

MAX_MOTIF_TRITS = 15
LARGEST_SINGLE_CODEBOOK = 1 << 12  # rows that every query is compared with
MEMORY_ROWS = 1 << 15  # rows of each hash table of a memory that is asked for without a size
AUDIO_RATE = 8000  # samples a second of a model that is asked to hear
VIDEO_SIZE = 16  # pixels a side of the clips of a model that is asked to draw them
LATENT_CHANNELS = 16  # of the latents of clips
VIDEO_HEAD_DIM = 32  # width of a head of attention in the head that draws clips
ENCODER_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "use_swiglu_ffn"),
)  # what a frozen image encoder is made from
AUTOENCODER_FIELDS = (
    *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"),
    *("layers_per_block", "act_fn", "latent_channels", "norm_num_groups", "scaling_factor", "shift_factor"),
    *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
)  # what a frozen autoencoder of frames is made from
IMAGE_SIZE = 224  # pixels a side of the images of a model that is asked to see

_WIDTH = (1, 1 << 20)
_COUNT = (1, 1 << 31)
_FROM_ZERO = (0, 1 << 31)
_MAX_TOML_BYTES = 1 << 20


def did_you_mean(name: str, allowed: Collection[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `allowed`, or an empty string if none is close."""
    import difflib

    close = difflib.get_close_matches(name[:64], list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def settle_types(config: Any) -> None:
    """Check every field against its annotation; integers become floats, and lists tuples, where due."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        settled = _settled(spec.name, spec.type, value)
        if settled is not value:
            object.__setattr__(config, spec.name, settled)


def _settled(name: str, kind: Any, value: Any) -> Any:
    if isinstance(kind, UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} must be a list of strings, got {_described(value)}")
        return tuple(_settled(name, str, item) for item in value)
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(
            kind, kind
        )
        raise UserError(f"{name} must be {wanted}, got {_described(value)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value!r}")
    if kind is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{name} is not valid Unicode text: {_short(value)}") from error
    return value


def require_range(config: Any, name: str, low: int, high: int) -> None:
    """Raise UserError unless the field `name` is in low...high."""
    value = getattr(config, name)
    if not low <= value <= high:
        raise UserError(f"{name} must be between {low} and {high}, got {_short(value)}")


def require_name(setting: str, value: str, allowed: Collection[str]) -> None:
    """Raise UserError, with a suggestion, unless `value` is one of `allowed`."""
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise UserError(f"{setting} must be one of {', '.join(allowed)}, got {_short(value)}{hint}")


def _described(value: Any) -> str:
    return f"{_short(value)} ({type(value).__name__})"


def _short(value: Any) -> str:
    """A one-line `repr` of bounded length, also of integers too long for Python to print."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of an `ARBModel`. Widths that are multiples of 160 pack without padding.

    Attributes:
        vocab_size: Token ids: 256 bytes and 32 control tokens.
        dim: Width of the residual stream.
        num_prelude_layers: Blocks of attention and feed-forward ahead of the core.
        num_coda_layers: Blocks of attention and feed-forward after the core.
        num_heads: Attention heads.
        head_dim: Query and key dimensions per head without rotary position.
        rope_dim: Rotary query dimensions per head; the rotary key is shared by all heads. Even.
        value_dim: Value dimensions per head.
        kv_latent_dim: Width of the latent that keys and values are made from (what decoding caches).
        ffn_dim: Hidden width of the feed-forward part.
        ctx: Context length in bytes that the model trains with, at least 4.
        attention_window: Positions that attention looks back; 0 means the whole context.
        rope_theta: Base of the rotary frequencies.
        tscale: Weights that share a scale exponent: T4 ... T96 or ROW.
        motif_trits: Trits of a motif code (finite scalar quantisation, 3^k motifs); 0 leaves the VQ bridge
            out, unless `codebook_rows` asks for a learned codebook.
        codebook_rows: Rows of a learned codebook that replaces the trits of `motif_trits`; 0 is off. Above
            4,096 it is the product of two codebooks, so the number must be a square.
        num_experts: Routed experts of the core; 0 leaves the mixture of experts out.
        num_active_experts: Routed experts that each position uses; a shared one comes on top.
        expert_dim: Hidden width of every expert.
        core_ffn_dim: Hidden width of one feed-forward part that the core has in place of experts; 0 leaves it
            out.
        max_moe_iters: Most iterations of the core.
        halt_threshold: Sum of halting probabilities at which a position leaves the core.
        ponder_weight: Weight of the ponder cost (iterations and remainder of a position) in the loss, nats.
        graph_edges: Edges that the motif graph holds; 0 leaves the graph out. It needs motifs.
        graph_neighbours: Neighbours that send a message to a motif.
        graph_heads: Heads that weigh the neighbours.
        memory_rows: Rows of each hash table of the n-gram memory; 0 leaves the memory out.
        memory_heads: Hash tables for 2-grams, and as many for 3-grams.
        memory_dim: Width of a row.
        memory_over: What the n-grams consist of: bytes or motifs.
        memory_host: Whether the hash tables stay in host memory, wherever the model is.
        output_router: Whether a router over modalities stands ahead of the heads.
        image_size: Pixels a side of the square that every image is fitted into; 0 leaves the image sidecar
            out. A multiple of `image_patch`.
        image_patch: Pixels a side of a patch; an image is (image_size / image_patch)^2 positions.
        image_channels: 1 for grey, 3 for colour.
        audio_rate: Samples a second of sounds, a multiple of 200; 0 leaves the audio sidecar out.
        audio_samples: Samples of the longest sound that the model trains with.
        audio_dim: Width of the audio codec.
        audio_layers: Blocks on each side of the codec's codes.
        audio_codes: Codes of a fiftieth of a second.
        audio_trits: Trits of a code, one of 3^k.
        audio_equalise: Whether sounds that are heard are brought to one spectrum in the long run.
        image_encoder: Architecture of a frozen encoder ahead of the patch embedding, as a line of JSON (see
            `arbitor.sidecars.encoder`); empty is none.
        video_size: Pixels a side of clips of video; 0 leaves the video sidecar out. A multiple of
            `video_patch`.
        video_frames: Frames of a clip, a multiple of `video_stride`.
        video_channels: 1 for grey, 3 for colour.
        video_patch: Pixels a side of a position of the latents.
        video_stride: Frames of a position of the latents.
        video_dim: Width of the autoencoder and of the head that draws clips, a multiple of 32.
        video_layers: Blocks of that head.
        video_ids: Ids of a caption that it reads, the EOS behind it among them.
        video_autoencoder: Architecture of a frozen autoencoder of frames in place of the one of trits, as a
            line of JSON (see `arbitor.sidecars.vae`); empty is none.
    """

    vocab_size: int = 288
    dim: int = 160
    num_prelude_layers: int = 2
    num_coda_layers: int = 0
    num_heads: int = 2
    head_dim: int = 48
    rope_dim: int = 32
    value_dim: int = 80
    kv_latent_dim: int = 160
    ffn_dim: int = 640
    ctx: int = 128
    attention_window: int = 0
    rope_theta: float = 10000.0
    tscale: str = "ROW"
    motif_trits: int = 0
    codebook_rows: int = 0
    num_experts: int = 0
    num_active_experts: int = 2
    expert_dim: int = 640
    core_ffn_dim: int = 0
    max_moe_iters: int = 4
    halt_threshold: float = 0.99
    ponder_weight: float = 0.001
    graph_edges: int = 0
    graph_neighbours: int = 4
    graph_heads: int = 8
    memory_rows: int = 0
    memory_heads: int = 4
    memory_dim: int = 160
    memory_over: str = "bytes"
    memory_host: bool = False
    output_router: bool = False
    image_size: int = 0
    image_patch: int = 16
    image_channels: int = 3
    audio_rate: int = 0
    audio_samples: int = 8000
    audio_dim: int = 160
    audio_layers: int = 3
    audio_codes: int = 4
    audio_trits: int = 5
    audio_equalise: bool = True
    image_encoder: str = ""
    video_size: int = 0
    video_frames: int = 8
    video_channels: int = 1
    video_patch: int = 4
    video_stride: int = 2
    video_dim: int = 160
    video_layers: int = 4
    video_ids: int = 16
    video_autoencoder: str = ""

    @property
    def has_motifs(self) -> bool:
        """Whether every position has a motif: the VQ bridge is on."""
        return self.motif_trits > 0 or self.codebook_rows > 0

    @property
    def has_core(self) -> bool:
        """Whether there is a core to iterate: experts or what replaces them, or a graph."""
        return self.num_experts > 0 or self.core_ffn_dim > 0 or self.graph_edges > 0

    def __post_init__(self) -> None:
        settle_types(self)
        require_range(self, "vocab_size", 288, 1 << 16)
        for name in ("dim", "num_heads", "head_dim", "value_dim", "kv_latent_dim", "ffn_dim"):
            require_range(self, name, *_WIDTH)
        require_range(self, "rope_dim", 2, 1 << 20)
        if self.rope_dim % 2:
            raise UserError(f"rope_dim must be even (rotary dimensions come in pairs), got {self.rope_dim}")
        require_range(self, "num_prelude_layers", 0, 10_000)
        require_range(self, "num_coda_layers", 0, 10_000)
        if self.num_prelude_layers + self.num_coda_layers == 0:
            raise UserError(
                "num_prelude_layers and num_coda_layers are both 0; a model needs at least one layer"
            )
        require_range(self, "ctx", 4, 1 << 24)
        require_range(self, "attention_window", *_FROM_ZERO)
        if not 1.0 < self.rope_theta <= 1e12:
            raise UserError(f"rope_theta must be above 1 and at most 1e12, got {self.rope_theta!r}")
        require_name("tscale", self.tscale, TSCALES)
        self._check_parts()

    def _check_parts(self) -> None:
        require_range(self, "motif_trits", 0, MAX_MOTIF_TRITS)
        require_range(self, "codebook_rows", 0, 1 << 24)
        root = math.isqrt(self.codebook_rows)
        if self.codebook_rows > LARGEST_SINGLE_CODEBOOK and root**2 != self.codebook_rows:
            raise UserError(
                f"codebook_rows is {self.codebook_rows}; above {LARGEST_SINGLE_CODEBOOK} a codebook is the "
                f"product of two of equal size, so it must be a square: {root**2} or {(root + 1) ** 2}, say"
            )
        if self.motif_trits and self.codebook_rows:
            raise UserError(
                f"motif_trits is {self.motif_trits} and codebook_rows {self.codebook_rows}; motifs are codes "
                "of trits or rows of a learned codebook: set one of them to 0"
            )
        require_range(self, "num_experts", 0, 4096)
        if self.num_experts:
            require_range(self, "num_active_experts", 1, self.num_experts)
        require_range(self, "expert_dim", *_WIDTH)
        require_range(self, "core_ffn_dim", 0, _WIDTH[1])
        if self.num_experts and self.core_ffn_dim:
            raise UserError(
                f"num_experts is {self.num_experts} and core_ffn_dim {self.core_ffn_dim}; the core has "
                "experts or one feed-forward part: set one of them to 0"
            )
        require_range(self, "max_moe_iters", 1, 64)
        if not 0.0 < self.halt_threshold <= 1.0:
            raise UserError(f"halt_threshold must be above 0 and at most 1, got {self.halt_threshold!r}")
        if not 0.0 <= self.ponder_weight <= 100.0:
            raise UserError(f"ponder_weight must be between 0 and 100, got {self.ponder_weight!r}")
        require_range(self, "graph_edges", 0, 1 << 24)
        if self.graph_edges and not self.has_motifs:
            raise UserError("graph_edges is set, but there are no motifs to link; set motif_trits as well")
        require_range(self, "graph_neighbours", 1, 256)
        require_range(self, "graph_heads", 1, 4096)
        require_range(self, "memory_rows", 0, 1 << 28)
        require_range(self, "memory_heads", 1, 64)
        require_range(self, "memory_dim", *_WIDTH)
        require_name("memory_over", self.memory_over, ("bytes", "motifs"))
        if self.memory_rows and self.memory_over == "motifs" and not self.has_motifs:
            raise UserError("memory_over is 'motifs', but there are none; set motif_trits, or use 'bytes'")
        self._check_image()
        self._check_audio()
        self._check_video()

    def _check_video(self) -> None:
        require_range(self, "video_size", 0, 1024)
        require_range(self, "video_frames", 1, 1024)
        require_range(self, "video_patch", 1, 1024)
        require_range(self, "video_stride", 1, 1024)
        if self.video_channels not in (1, 3):
            raise UserError(f"video_channels must be 1 (grey) or 3 (colour), got {self.video_channels}")
        for whole, part in (("video_size", "video_patch"), ("video_frames", "video_stride")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}; "
                    "give sizes that divide"
                )
        require_range(self, "video_dim", VIDEO_HEAD_DIM, _WIDTH[1])
        if self.video_dim % VIDEO_HEAD_DIM:
            raise UserError(f"video_dim must be a multiple of {VIDEO_HEAD_DIM}, got {self.video_dim}")
        require_range(self, "video_layers", 1, 1000)
        require_range(self, "video_ids", 5, 1 << 16)
        if self.video_autoencoder:
            self._check_autoencoder()

    def _check_autoencoder(self) -> None:
        import json

        try:
            fields = json.loads(self.video_autoencoder)
            factor, latents = 1 << (len(fields["block_out_channels"]) - 1), fields["latent_channels"]
            channels = fields["in_channels"]
            complete = sorted(fields) == sorted(AUTOENCODER_FIELDS) and latents == LATENT_CHANNELS
        except (ValueError, TypeError, KeyError, RecursionError):
            complete = False
        if not complete:
            raise UserError(
                "video_autoencoder is no line of JSON with the architecture of an autoencoder of "
                f"{LATENT_CHANNELS} channels; --autoencoder writes one"
            )
        for name, its in (("video_patch", factor), ("video_stride", 1)):
            if getattr(self, name) != its:
                raise UserError(f"{name} is {getattr(self, name)}; that of the frozen autoencoder is {its}")
        if self.video_channels > channels:
            raise UserError(
                f"video_channels is {self.video_channels}; the frozen autoencoder takes grey only"
            )

    def _check_audio(self) -> None:
        if self.audio_rate and (not 2000 <= self.audio_rate <= 384_000 or self.audio_rate % 200):
            raise UserError(
                f"audio_rate must be 0 or a multiple of 200 from 2000 to 384000 Hz, got {self.audio_rate}"
            )
        require_range(self, "audio_samples", *_COUNT)
        require_range(self, "audio_dim", *_WIDTH)
        require_range(self, "audio_layers", 1, 1000)
        require_range(self, "audio_codes", 1, 64)
        require_range(self, "audio_trits", 1, 9)

    def _check_image(self) -> None:
        require_range(self, "image_size", 0, 4096)
        require_range(self, "image_patch", 1, 4096)
        if self.image_channels not in (1, 3):
            raise UserError(f"image_channels must be 1 (grey) or 3 (colour), got {self.image_channels}")
        if self.image_size % self.image_patch:
            raise UserError(
                f"image_size {self.image_size} is no multiple of image_patch {self.image_patch}; "
                "give sizes that divide"
            )
        if self.image_encoder:
            self._check_encoder()

    def _check_encoder(self) -> None:
        import json

        try:
            fields = json.loads(self.image_encoder)
            patch, channels = fields["patch_size"], fields["num_channels"]
            complete = sorted(fields) == sorted(ENCODER_FIELDS)
        except (ValueError, TypeError, KeyError, RecursionError):
            complete = False
        if not complete:
            raise UserError(
                "image_encoder is no line of JSON with the architecture of an encoder; "
                "--image-encoder writes one"
            )
        if (patch, channels) != (self.image_patch, self.image_channels):
            raise UserError(
                f"image_patch is {self.image_patch} and image_channels {self.image_channels}; the encoder "
                f"takes {patch} and {channels}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per micro-batch.
        accum: Micro-batches per optimizer step.
        lr: Peak learning rate in trits per step; unset, that of the state, less for over 480 steps of text.
        state: What training keeps: lean (1.2 bytes a weight), compact (1.8) or full (2.3).
        rule: Direction of the votes: spectral, sinkhorn, row or sign.
        seed: Seed of initialisation, data order and stochastic rounding.
        warmup: Share of the steps in which the learning rate rises linearly.
        accum_threshold: Accumulator value at which a trit flips; unset, the default of the state.
        e_accum_threshold: Accumulator value at which a scale exponent moves.
        scale_lr: Strength of the scale votes; 0 keeps the exponents.
        eval_steps: Held-out windows per evaluation during training.
        eval_interval: Steps between evaluations; 0 evaluates at the end only.
        save_interval: Steps between checkpoints; 0 saves at the end only.
        log_interval: Steps between readings of the loss from the device.
        save: Whether checkpoints are written at all.
        device: auto, cpu or cuda.
    """

    steps: int = 440
    batch: int = 16
    accum: int = 1
    lr: float | None = None
    state: str = "full"
    rule: str = "spectral"
    seed: int = 0
    warmup: float = 0.05
    accum_threshold: int | None = None
    e_accum_threshold: int = 32
    scale_lr: float = 0.0
    eval_steps: int = 64
    eval_interval: int = 80
    save_interval: int = 80
    log_interval: int = 1
    save: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        settle_types(self)
        for name in ("steps", "batch", "accum", "eval_steps", "log_interval"):
            require_range(self, name, *_COUNT)
        for name in ("eval_interval", "save_interval"):
            require_range(self, name, *_FROM_ZERO)
        if self.lr is not None and not 0.0 < self.lr <= 100.0:
            raise UserError(f"lr must be above 0 and at most 100 (trits per step), got {self.lr!r}")
        require_name("state", self.state, STATES)
        require_name("rule", self.rule, RULES)
        require_range(self, "seed", 0, (1 << 63) - 1)
        if not 0.0 <= self.warmup <= 1.0:
            raise UserError(f"warmup must be between 0 and 1 (a share of the steps), got {self.warmup!r}")
        if self.accum_threshold is not None:
            require_range(self, "accum_threshold", 2, 127)
        require_range(self, "e_accum_threshold", 1, 127)
        if not 0.0 <= self.scale_lr <= 1.0:
            raise UserError(f"scale_lr must be between 0 and 1 (octaves per step), got {self.scale_lr!r}")
        require_name("device", self.device, DEVICES)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What a model is trained on.

    Attributes:
        data: Files, folders or globs; empty means the embedded corpus (the standard library's sources).
        held_out: What evaluation is measured on: a path, or the share of the data to hold out. Unset, a
            tenth of the data (a twentieth of the embedded corpus).
        field: Name of the field that holds the text in .jsonl files.
        augment: Whether images are shifted and turned, and sounds made faster, slower, louder and softer, a
            little at random.
        audio_task: What a model with the audio sidecar learns from recordings: codec, listen (sound to text)
            or speak (text to sound); empty where the data is something else.
        video_task: What a model with the video sidecar learns from clips: codec (pixels to latents and back)
            or flow (captions to latents); empty where the data is something else.
        encoder: Folder or hub name that a new model's frozen image encoder takes its weights from.
        autoencoder: Folder or hub name that a new model's frozen autoencoder takes its weights from.
        learnt_before: What was learnt before, of `LEARNT`: by the runs that this one started from, and in a
            finetune. Written by what starts a run; None in settings of earlier versions, which do not say.
    """

    data: tuple[str, ...] = ()
    held_out: str | None = None
    field: str = "text"
    augment: bool = True
    audio_task: str = ""
    video_task: str = ""
    encoder: str | None = None
    autoencoder: str | None = None
    learnt_before: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.held_out, (int, float)) and not isinstance(self.held_out, bool):
            object.__setattr__(self, "held_out", repr(self.held_out))  # `held_out = 0.1` in TOML
        settle_types(self)
        require_name("audio_task", self.audio_task, AUDIO_TASKS)
        require_name("video_task", self.video_task, VIDEO_TASKS)
        for name in self.learnt_before or ():
            require_name("learnt_before", name, LEARNT)
        for path in self.data:
            if not path:
                raise UserError("data contains an empty path; give a file, a folder or a glob")
        if self.held_out == "":
            raise UserError("held_out is empty; give a path or a fraction such as 0.1")
        if not self.field:
            raise UserError("field is empty; give the name of the .jsonl field that holds the text")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig:
    """Mixed pretraining: what is drawn how often. With all weights 0, a run is no mixed one.

    Attributes:
        text_weight: How often a micro-batch of text is drawn, relative to the other weights; 0 is never.
        code_weight: The same for source code.
        image_weight: The same for images with captions.
        audio_weight: The same for recordings with their texts.
        video_weight: The same for videos.
        text_data: Files, folders, globs or hub data sets (`hf:NAME[:SPLIT[:FIELD]]`); empty means the
            docstrings of Python's standard library.
        code_data: The same; empty means the standard library's sources.
        image_data: As `data` for images, or hub data sets; empty means scikit-learn's digits.
        audio_data: As `data` for recordings, or hub data sets; empty means synthesised sounds.
        video_data: As `data` for videos; empty means digits that move.
        train_codec: Whether the audio codec learns as well, from the recordings that are drawn.
        train_autoencoder: Whether the autoencoder of clips learns as well, from the videos that are drawn.
        preserve_state: Whether the rows of a batch of text or code are consecutive windows of a document,
            each read behind the KV ledger of the window before it.
    """

    text_weight: float = 0.0
    code_weight: float = 0.0
    image_weight: float = 0.0
    audio_weight: float = 0.0
    video_weight: float = 0.0
    text_data: tuple[str, ...] = ()
    code_data: tuple[str, ...] = ()
    image_data: tuple[str, ...] = ()
    audio_data: tuple[str, ...] = ()
    video_data: tuple[str, ...] = ()
    train_codec: bool = True
    train_autoencoder: bool = True
    preserve_state: bool = False

    def __post_init__(self) -> None:
        settle_types(self)
        for name in MIXED:
            weight = self.weight(name)
            if not 0.0 <= weight <= 1e6:
                raise UserError(f"{name}_weight must be between 0 and 1e6, got {weight!r}")
            if weight and weight < 1e-6:
                raise UserError(f"{name}_weight must be 0 or at least 1e-6, got {weight!r}")
            if any(not source for source in getattr(self, f"{name}_data", ())):
                raise UserError(f"{name}_data contains an empty path; give a file, a folder or a glob")

    def weight(self, name: str) -> float:
        """That of one of `MIXED`."""
        return float(getattr(self, f"{name}_weight"))

    @property
    def active(self) -> tuple[str, ...]:
        """Those of `MIXED` that are drawn."""
        return tuple(name for name in MIXED if self.weight(name) > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that defines a run.

    Attributes:
        preset: Name of the preset that the settings started from.
        model: Architecture.
        train: Training.
        data: Data.
        mix: Mixed pretraining, if any weight is above 0; its data then replaces that of `data`.
        version: Version of arbitor that made the run.
    """

    preset: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    version: str = __version__

    def __post_init__(self) -> None:
        settle_types(self)
        if self.data.video_task == "codec" and self.model.video_autoencoder:
            raise UserError("video_task is codec, but the autoencoder is a frozen one, which is not trained")

    @property
    def trains_autoencoder(self) -> bool:
        """Whether an autoencoder of clips learns along in a mixed run; a frozen one never does."""
        return self.mix.train_autoencoder and not self.model.video_autoencoder

    @property
    def learns(self) -> tuple[str, ...]:
        """What the run's own data teaches, of `LEARNT`."""
        data, mix = self.data, self.mix
        if mix.active:
            names = {_TAUGHT_BY[name] for name in mix.active}
            names |= {"codec"} if mix.train_codec and "speak" in names else set()
            names |= {"autoencoder"} if self.trains_autoencoder and "flow" in names else set()
        elif data.video_task:
            names = {"autoencoder" if data.video_task == "codec" else data.video_task}
        elif data.audio_task:
            names = {data.audio_task}
        else:
            names = {"image" if self.model.image_size else "text"}
        return in_order(names)

    @property
    def learnt(self) -> tuple[str, ...]:
        """What the run is known to have learnt, `learnt_before` included.

        What was learnt on a codec or an autoencoder is lost where that learns again: its codes, or latents,
        mean something else then.
        """
        names = set(self.data.learnt_before or ())
        names -= {"listen", "speak"} if "codec" in self.learns else set()
        names -= {"flow"} if "autoencoder" in self.learns else set()
        return in_order({*self.learns, *names})


_TAUGHT_BY = {"text": "text", "code": "text", "image": "image", "audio": "speak", "video": "flow"}


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Those of `LEARNT` that are among `names`."""
    return tuple(name for name in LEARNT if name in names)


SECTIONS = {"model": ModelConfig, "train": TrainConfig, "data": DataConfig, "mix": MixConfig}
_SECTION_OF = {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}

# The trunks of `small` and `base`; the presets with parts split the same layers around the core.
_SMALL: dict[str, Any] = {
    "dim": 480,
    "num_heads": 6,
    "head_dim": 48,
    "rope_dim": 32,
    "value_dim": 80,
    "kv_latent_dim": 160,
    "ffn_dim": 1920,
    "ctx": 256,
}
_BASE: dict[str, Any] = {
    "dim": 960,
    "num_heads": 12,
    "head_dim": 48,
    "rope_dim": 32,
    "value_dim": 80,
    "kv_latent_dim": 320,
    "ffn_dim": 3840,
    "ctx": 1024,
}
_ALL_PARTS: dict[str, Any] = {
    "motif_trits": 9,
    "max_moe_iters": 4,
    "graph_edges": 1 << 16,
    "output_router": True,
}
_SMALL_TRAINING = TrainConfig(steps=1000, batch=64)
_BASE_TRAINING = TrainConfig(steps=10_000, batch=32, eval_interval=500, save_interval=500)

PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(preset="tiny"),
    "small": RunConfig(
        preset="small", model=ModelConfig(num_prelude_layers=4, **_SMALL), train=_SMALL_TRAINING
    ),
    "base": RunConfig(preset="base", model=ModelConfig(num_prelude_layers=12, **_BASE), train=_BASE_TRAINING),
    "arb-small": RunConfig(
        preset="arb-small",
        model=ModelConfig(
            num_prelude_layers=2, num_coda_layers=2, num_experts=8, expert_dim=2240, **_SMALL, **_ALL_PARTS
        ),
        train=_SMALL_TRAINING,
    ),
    "arb-1b": RunConfig(
        preset="arb-1b",
        model=ModelConfig(
            num_prelude_layers=6, num_coda_layers=6, num_experts=32, expert_dim=17_920, **_BASE, **_ALL_PARTS
        ),
        train=dataclasses.replace(_BASE_TRAINING, state="lean"),
    ),
}


def preset(name: str, **overrides: Any) -> RunConfig:
    """The preset `name` with single settings replaced, e.g. `preset("tiny", steps=100, dim=320)`.

    Raises:
        UserError: for an unknown preset or setting, or a value that is not allowed.
    """
    if name not in PRESETS:
        raise UserError(
            f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; presets: {', '.join(PRESETS)}"
        )
    return override(PRESETS[name], **overrides)


def override(config: RunConfig, **values: Any) -> RunConfig:
    """A copy of `config` with settings of any section replaced by name; names are unique across sections.

    Raises:
        UserError: for an unknown setting or a value that is not allowed.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in _SECTION_OF:
            raise UserError(f"unknown setting {name!r}{did_you_mean(name, _SECTION_OF)}")
        changes.setdefault(_SECTION_OF[name], {})[name] = value
    sections = {s: dataclasses.replace(getattr(config, s), **change) for s, change in changes.items()}
    return dataclasses.replace(config, **sections) if sections else config


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: if the file is missing, unreadable, over 1 MiB or not TOML (naming the line if known).
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_TOML_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot read the config file {str(path)!r}: {reason}") from error
    if len(raw) > _MAX_TOML_BYTES:
        raise UserError(f"{path}: over 1 MiB, which no config file is; is this the right file?")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except RecursionError as error:
        raise UserError(f"{path}: not a config file: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError and integers of thousands of digits
        raise UserError(f"{path}: not valid TOML: {_one_line(error)}") from error


def load_config(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """The settings of a TOML file laid over `base`.

    Without a `base` the file's own `preset` is the base (`tiny` if it names none); with one, the file may
    not name another preset.

    Raises:
        UserError: for an unreadable file, an unknown table or key (with a suggestion), a value of the wrong
            type or out of range; the message starts with the file's name.
    """
    tables = read_toml(path)
    try:
        return _overlay(tables, base)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def written_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a TOML file which `load_config` takes writes, by name."""
    tables = read_toml(path)
    return {name: value for section in SECTIONS for name, value in tables.get(section, {}).items()}


def dump_toml(config: RunConfig) -> str:
    """`config` as TOML text; `load_config` of it gives an equal `RunConfig`. Unset settings are left out."""
    lines = [f"preset = {_toml_value(config.preset)}", f"version = {_toml_value(config.version)}"]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            if value is not None:
                lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _overlay(tables: Mapping[str, Any], base: RunConfig | None) -> RunConfig:
    top = [f.name for f in dataclasses.fields(RunConfig)]
    for key, value in tables.items():
        if key not in top:
            section = _SECTION_OF.get(key)
            hint = f" (it belongs in [{section}])" if section else did_you_mean(key, top)
            raise UserError(f"unknown key {_short(key)}{hint}; allowed: {', '.join(top)}")
        if key in SECTIONS and not isinstance(value, dict):
            raise UserError(f"{key} must be a table [{key}], got {_described(value)}")
        if key not in SECTIONS and not isinstance(value, str):
            raise UserError(f"{key} must be a string, got {_described(value)}")
    named = tables.get("preset")
    if base is None:
        base = preset("tiny" if named is None else named)
    elif named is not None and named != base.preset:
        raise UserError(
            f"the file's preset {_short(named)} contradicts the preset {base.preset!r}; drop one of them"
        )
    sections = {}
    for section, cls in SECTIONS.items():
        names = [f.name for f in dataclasses.fields(cls)]
        table = tables.get(section, {})
        for key in table:
            if key not in names:
                home = _SECTION_OF.get(key)
                hint = f" (it belongs in [{home}])" if home else did_you_mean(key, names)
                raise UserError(
                    f"unknown key {_short(key)} in [{section}]{hint}; allowed: {', '.join(names)}"
                )
        sections[section] = dataclasses.replace(getattr(base, section), **table)
    return dataclasses.replace(base, version=tables.get("version", base.version), **sections)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _toml_value(value: str | bool | float | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if " " <= c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
