"""Settings of a finetune, checked where they are made, and `finetune.json`, where a run keeps them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from arbitor.config import DEVICES, STATES, require_name, require_range, settle_types
from arbitor.errors import UserError
from arbitor.flags import flag_of, naming_flags
from arbitor.train.runs import FINETUNE_FILE as CONFIG_FILE
from arbitor.train.tensorfile import FORMAT, dump_document, parse_document, read_text

AUDIO_TASKS = ("listen", "speak")
LORA_LR = 5e-3
FULL_LR_SHARE = 0.6  # of the peak with which the state trains from scratch


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that defines a finetune.

    Attributes:
        base: path of the checkpoint that it starts from.
        base_fingerprint: checksum of that checkpoint's weights.
        data: files, folders or globs of conversations (or of images, recordings, videos); empty is the
            embedded set.
        held_out: path, or share of the conversations, to measure on; unset, a tenth.
        vision: whether the data is images with captions; the base must take images.
        audio: whether the data is recordings with their texts; the base must take sounds.
        audio_task: what is learnt of them: listen (sound to text) or speak (text to sound).
        video: whether the data is videos with captions, whose clips are drawn; the base must have the part.
        full: whether the trits themselves go on voting; else float adapters learn beside them.
        rank: rank of an adapter.
        alpha: an adapter's update is scaled by alpha / rank; unset, twice the rank.
        dropout: share of an adapter's inputs zeroed in training.
        targets: words of the names of the linears that get an adapter; empty is all but those that decide.
        lr: peak learning rate: of AdamW for adapters, in trits per step with `full`.
        state: what training keeps with `full`: lean, compact or full.
        steps: optimizer steps.
        batch: conversations, or media, per step.
        ctx: longest conversation in bytes and control tokens; of sounds, samples.
        seed: of adapters, order and rounding.
        warmup: share of the steps in which the learning rate rises.
        eval_interval: steps between evaluations; 0 is at the end only.
        save_interval: steps between checkpoints; 0 is at the end only.
        eval_examples: held-out conversations, or media, that an evaluation reads at most.
        device: auto, cpu or cuda.
    """

    base: str
    base_fingerprint: str
    data: tuple[str, ...] = ()
    held_out: str | None = None
    vision: bool = False
    audio: bool = False
    audio_task: str = ""
    video: bool = False
    full: bool = False
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    lr: float | None = None
    state: str = "full"
    steps: int = 400
    batch: int = 16
    ctx: int | None = None
    seed: int = 0
    warmup: float = 0.05
    eval_interval: int = 100
    save_interval: int = 100
    eval_examples: int = 256
    device: str = "auto"

    def __post_init__(self) -> None:
        with naming_flags([field.name for field in dataclasses.fields(self)]):
            self._check()

    def _check(self) -> None:
        settle_types(self)
        for name in ("data", "targets"):
            if not all(getattr(self, name)):
                raise UserError(f"{name} holds an empty name")
        for name, low, high in (
            ("steps", 1, 1 << 31),
            ("batch", 1, 1 << 20),
            ("seed", 0, (1 << 63) - 1),
            ("eval_interval", 0, 1 << 31),
            ("save_interval", 0, 1 << 31),
            ("eval_examples", 1, 1 << 31),
        ):
            require_range(self, name, low, high)
        if self.ctx is not None and self.ctx < 4:
            raise UserError(f"ctx must be at least 4, got {self.ctx}")
        if self.lr is not None and not 0 < self.lr <= 100:
            raise UserError(f"lr must be above 0 and at most 100, got {self.lr!r}")
        flags = [flag_of(name) for name in ("vision", "audio", "video") if getattr(self, name)]
        if len(flags) > 1:
            raise UserError(f"{' and '.join(flags)}: a finetune learns from one medium; give one of them")
        if self.audio:
            require_name("audio_task", self.audio_task, AUDIO_TASKS)
        elif self.audio_task:
            raise UserError("audio_task is of sounds: give --enable-audio as well")
        require_name("state", self.state, STATES)
        require_name("device", self.device, DEVICES)

    @property
    def learns(self) -> tuple[str, ...]:
        """What the data teaches, of `arbitor.config.LEARNT`."""
        if self.audio:
            return (self.audio_task,)
        return ("flow",) if self.video else ("image",) if self.vision else ("chat",)

    def dump(self) -> str:
        """Text of `finetune.json`."""
        return dump_document({**dataclasses.asdict(self), "format": FORMAT})


def load_finetune(folder: Path) -> FinetuneConfig:
    """The settings of the finetune in `folder`.

    Raises:
        UserError: missing, damaged, or of a later arbitor.
    """
    path = folder / CONFIG_FILE
    document = parse_document(path, read_text(path))
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    unknown = sorted(document.keys() - names - {"format", "checksum"})
    if unknown:
        raise UserError(f"{path} has the unknown setting {unknown[0]!r}: update arbitor")
    try:
        return FinetuneConfig(**{name: value for name, value in document.items() if name in names})
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
