"""Settings of a finetune, checked where they are made, and `finetune.json`, where a run keeps them."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arbitor.config import DEVICES, STATES
from arbitor.errors import UserError
from arbitor.train.runs import FINETUNE_FILE as CONFIG_FILE
from arbitor.train.tensorfile import FORMAT, dump_document, parse_document, read_text

LORA_LR = 5e-3
FULL_LR_SHARE = 0.6  # of the peak with which the state trains from scratch


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Everything that defines a finetune.

    Attributes:
        base: path of the checkpoint that it starts from.
        base_fingerprint: checksum of that checkpoint's weights.
        data: files, folders or globs of conversations; empty is the embedded set.
        held_out: path, or share of the conversations, to measure on; unset, a tenth.
        full: whether the trits themselves go on voting; else float adapters learn beside them.
        rank: rank of an adapter.
        alpha: an adapter's update is scaled by alpha / rank; unset, twice the rank.
        dropout: share of an adapter's inputs zeroed in training.
        targets: words of the names of the linears that get an adapter; empty is all but those that decide.
        lr: peak learning rate: of AdamW for adapters, in trits per step with `full`.
        state: what training keeps with `full`: lean, compact or full.
        steps: optimizer steps.
        batch: conversations per step.
        ctx: longest conversation in bytes and control tokens.
        seed: of adapters, order and rounding.
        warmup: share of the steps in which the learning rate rises.
        eval_interval: steps between evaluations; 0 is at the end only.
        save_interval: steps between checkpoints; 0 is at the end only.
        eval_examples: held-out conversations that an evaluation reads at most.
        device: auto, cpu or cuda.
    """

    base: str
    base_fingerprint: str
    data: tuple[str, ...] = ()
    held_out: str | None = None
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
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _settled(field.name, field.type, getattr(self, field.name)))
        for name, low, high in (
            ("steps", 1, 1 << 31),
            ("batch", 1, 1 << 20),
            ("seed", 0, (1 << 63) - 1),
            ("eval_interval", 0, 1 << 31),
            ("save_interval", 0, 1 << 31),
            ("eval_examples", 1, 1 << 31),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{_flag(name)} must be between {low} and {high}, got {getattr(self, name)}")
        if self.ctx is not None and self.ctx < 4:
            raise UserError(f"--ctx must be at least 4, got {self.ctx}")
        if self.lr is not None and not 0 < self.lr <= 100:
            raise UserError(f"--lr must be above 0 and at most 100, got {self.lr!r}")
        if self.state not in STATES:
            raise UserError(f"--state must be one of {', '.join(STATES)}, got {self.state!r}")
        if self.device not in DEVICES:
            raise UserError(f"--device must be one of {', '.join(DEVICES)}, got {self.device!r}")

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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settled(name: str, kind: Any, value: Any) -> Any:
    """`value` in the type of its field."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        value = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(item, str) and item for item in value):
            raise UserError(f"{_flag(name)} holds an empty name")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{_flag(name)} must be a {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{_flag(name)} must be finite, got {value!r}")
    return value
