"""What a finetune learns from and is measured by: conversations and captions, or recordings and clips.

Of recordings and clips, batches and evaluations are those of the tasks that trained the base.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arbitor.chat import Chat
from arbitor.config import RunConfig, override
from arbitor.data.audio import StreamedAudio, open_audio
from arbitor.data.images import Geometry
from arbitor.data.video import ClipGeometry, open_videos
from arbitor.errors import UserError
from arbitor.finetune.config import FinetuneConfig
from arbitor.finetune.data import Instructions, open_captions, open_instructions
from arbitor.finetune.instructions import Example, answer_losses, collate, prefix_of
from arbitor.generate import greedy_texts
from arbitor.model import ARBModel
from arbitor.model.vocab import NUM_BYTES
from arbitor.train.audio_tasks import AUDIO_TASKS, AudioTask
from arbitor.train.metrics import FIGURES
from arbitor.train.video_tasks import FlowTask, VideoTask

if TYPE_CHECKING:
    from arbitor.finetune.methods import Method

LN2 = math.log(2.0)
LOSS_UNITS = {
    "bits_per_byte": "nats per byte",
    "bits_per_code": "nats per code",
    "velocity_loss": "of mean square error",
}  # of a loss whose figure is this one
NUM_SAMPLES = 3
SAMPLE_BYTES = 80
# Parts that a loss of bytes does not reach, by the first words of their names.
_OTHER_MEDIA = ("sidecars.image", "sidecars.audio", "sidecars.video", "heads")
_CODECS = ("sidecars.audio.codec", "sidecars.video")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss of held-out data.

    Attributes:
        loss: mean over all that is predicted: nats of a byte or code, or the square of a velocity's error.
        count: bytes that were predicted.
        num_examples: conversations, images, recordings or clips that they stand in.
        right: share of them that the model writes right, byte for byte; None where that was not tried.
    """

    loss: float
    count: int
    num_examples: int
    right: float | None = None


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Loss of a batch.

    Attributes:
        main: scalar with its gradient, what `HeldOut.loss` is of held-out data.
        parts: weighted losses of the model's parts, if they count; a scalar.
        count: bytes that were learnt.
    """

    main: Tensor
    parts: Tensor | None
    count: int


class Material(Protocol):
    """What the loop needs of the data.

    Attributes:
        description: one line for the user.
        unit: what an example is, in words.
        measures: what the loss is of, in words; with underscores, a key of files.
        figure: what it is in, of `arbitor.train.metrics.FIGURES`; bits where it is in nats.
        apart: parts of the model that the loss does not reach, by the first words of their names.
        num_train: examples to learn from.
    """

    description: str
    unit: str
    measures: str
    figure: str
    apart: tuple[str, ...]
    num_train: int

    def fingerprint(self) -> str:
        """Checksum of all that is learnt from and measured."""

    def step_loss(self, model: ARBModel, method: "Method", step: int) -> StepLoss:
        """Loss of the next batch, that of step number `step`, 0 for the first."""

    def measure(self, model: ARBModel) -> HeldOut:
        """Loss of the held-out examples; the model must be in evaluation mode."""

    def samples(self, model: ARBModel, folder: Path) -> str:
        """What the model makes of some held-out examples, in words; what is no text goes into `folder`."""

    def state(self) -> dict[str, Any]:
        """Where it stands in the data, plain JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


def in_bits(loss: float, figure: str) -> float:
    """A loss in its figure's unit: bits of nats, anything else as it is."""
    return loss / LN2 if figure.startswith("bits") else loss


def told(loss: float, figure: str) -> str:
    """A loss in words."""
    if figure.startswith("bits"):
        return f"{loss:.4f} nats, {loss / LN2:.4f} {FIGURES[figure]}"
    return f"{loss:.4f}"


def batch_order(seed: int, step: int, num_examples: int, batch: int) -> np.ndarray:
    """Which examples step `step` (0 for the first) learns from: int64 [batch].

    The examples pass in epochs, each in an order of its own that depends on seed and epoch alone.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, offsets = np.divmod(places, num_examples)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(num_examples)
        chosen[epochs == epoch] = order[offsets[epochs == epoch]]
    return chosen


class Answers:
    """Conversations, or captions of images; the loss is that of answers. See `Material`.

    Args:
        data: the examples.
        config: settings of the finetune.
    """

    measures = "answer loss"
    figure = "bits_per_byte"

    def __init__(self, data: Instructions, config: FinetuneConfig) -> None:
        self._data, self._config = data, config
        self.description, self.unit = data.description, data.unit
        self.apart = tuple(part for part in _OTHER_MEDIA if not (config.vision and part == "sidecars.image"))
        self.num_train = len(data.train)

    def fingerprint(self) -> str:
        """See `Material`."""
        return self._data.fingerprint()

    def step_loss(self, model: ARBModel, method: "Method", step: int) -> StepLoss:
        """See `Material`."""
        chosen = batch_order(self._config.seed, step, self.num_train, self._config.batch)
        examples = [self._data.train[i] for i in chosen]
        ids_BL, is_answer_BN = collate(examples)
        logits_BNS, parts = method.forward(model, ids_BL, prefix_of(model, examples))
        losses = answer_losses(logits_BNS, ids_BL, is_answer_BN)
        return StepLoss(losses.mean(), parts, len(losses))

    @torch.no_grad()
    def measure(self, model: ARBModel) -> HeldOut:
        """See `Material`."""
        examples = self._data.held_out[: self._config.eval_examples]
        total, count = 0.0, 0
        # Neighbours of like length share a batch; the sum is over all, so the order does not matter.
        ordered = sorted(examples, key=lambda example: len(example.ids))
        for first in range(0, len(ordered), self._config.batch):
            chosen = ordered[first : first + self._config.batch]
            ids_BL, is_answer_BN = collate(chosen)
            logits_BNS = model(ids_BL, prefix=prefix_of(model, chosen)).logits
            losses = answer_losses(logits_BNS, ids_BL, is_answer_BN)
            total += float(losses.double().sum())
            count += len(losses)
        return HeldOut(total / count, count, len(examples))

    def samples(self, model: ARBModel, folder: Path) -> str:
        """See `Material`."""
        if pictured := [e for e in self._data.held_out[:NUM_SAMPLES] if e.pixels is not None]:
            return _captions(model, pictured)
        lines = []
        for messages, answer in self._data.prompts[:NUM_SAMPLES]:
            chat = Chat(model, temperature=0, max_bytes=SAMPLE_BYTES)
            drawn = b"".join(chat.answer(messages))
            for title, text in (("user", messages[-1].content), ("model", drawn), ("right", answer)):
                shown = text[-200:].decode("utf-8", "replace")
                lines.append(f"{title:>5}: {' '.join(shown.split())}")
            lines.append("")
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """See `Material`: the step says all of it."""
        return {"conversations": self.num_train}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Material`."""


def _captions(model: ARBModel, pictured: list[Example]) -> str:
    prefix = prefix_of(model, pictured)
    assert prefix is not None
    texts = greedy_texts(model, prefix, SAMPLE_BYTES)
    wanted = [bytes(e.ids[e.is_answer & (e.ids < NUM_BYTES)].tolist()) for e in pictured]
    pairs = [
        (text.decode("utf-8", "replace"), right.decode("utf-8", "replace"))
        for text, right in zip(texts, wanted, strict=True)
    ]
    return "".join(f"model: {text}\nright: {right}\n\n" for text, right in pairs)


class Media:
    """Recordings or clips, by a task that trains on them. See `Material`.

    Args:
        task: its batches are made as in training, moved about and with captions left out as there.
        measures: see `Material`.
        apart: see `Material`.
        most: held-out examples that an evaluation reads at most.
        batch: examples of a step.
    """

    def __init__(
        self, task: AudioTask | VideoTask, measures: str, apart: tuple[str, ...], most: int, batch: int
    ) -> None:
        self._task, self._most = task, most
        self._bytes_per_step = batch * task.bytes_per_item
        self.description, self.unit = task.description, task.unit
        self.measures, self.figure, self.apart = measures, task.figure, apart
        assert not isinstance(task.corpus, StreamedAudio), "a finetune reads the first recordings"
        self._corpus = task.corpus
        self.num_train = len(self._corpus.train)

    def fingerprint(self) -> str:
        """See `Material`."""
        corpus = self._corpus
        both = [self._task.description, corpus.train.fingerprint(), corpus.held_out.fingerprint()]
        return hashlib.blake2b(repr(both).encode(), digest_size=16).hexdigest()

    def step_loss(self, model: ARBModel, method: "Method", step: int) -> StepLoss:
        """See `Material`."""
        output = self._task.output(model, *self._task.next_batch())
        assert output.loss is not None
        main = output.losses[self._task.main_loss]
        return StepLoss(main, output.loss - main if method.counts_parts else None, self._bytes_per_step)

    def measure(self, model: ARBModel) -> HeldOut:
        """See `Material`."""
        result = self._task.evaluate(model, self._most, None)
        loss = result.bits_per_byte * (LN2 if self.figure.startswith("bits") else 1.0)
        return HeldOut(loss, result.num_bytes, result.windows, result.captions_right)

    def samples(self, model: ARBModel, folder: Path) -> str:
        """See `Material`."""
        folder.mkdir(exist_ok=True)
        self._task.write_samples(model, folder)
        if not any(folder.iterdir()):
            folder.rmdir()
        return self._task.show(model)

    def state(self) -> dict[str, Any]:
        """See `Material`: the sampler's."""
        return self._task.sampler_state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Material`."""
        self._task.restore_sampler(state)


def open_material(config: FinetuneConfig, base: RunConfig) -> Material:
    """The data that the settings name, as the base takes it.

    Args:
        config: settings of the finetune.
        base: those that the base was trained with.

    Raises:
        UserError: data that cannot be used, or a base without the part that it needs.
    """
    model = base.model
    if config.audio:
        _refuse_base_without(model.audio_rate, "--enable-audio", config.base, "sounds", "`arbitor audio`")
        samples = config.ctx or model.audio_samples
        settings = override(_settings(config, base), audio_task=config.audio_task, audio_samples=samples)
        recordings = open_audio(config.data, config.held_out, model.audio_rate)
        task = AUDIO_TASKS[config.audio_task](settings, recordings)
        media = ("sidecars.image", *_CODECS)
        if config.audio_task == "listen":
            return Media(task, "answer loss", (*media, "heads"), config.eval_examples, config.batch)
        return Media(task, "code loss", (*media, "heads.video", "head"), config.eval_examples, config.batch)
    if config.video:
        _refuse_base_without(model.video_size, "--enable-video", config.base, "clips", "`arbitor diffusion`")
        length = _limited(config.ctx, model.video_ids, "ids of a caption")
        settings = override(_settings(config, base), video_task="flow", video_ids=length)
        geometry = ClipGeometry(
            size=model.video_size, frames=model.video_frames, channels=model.video_channels
        )
        clips = open_videos(config.data, config.held_out, geometry)
        apart = ("sidecars", "heads.audio", "head")
        flow = FlowTask(settings, clips)
        return Media(flow, "velocity loss", apart, config.eval_examples, config.batch)
    ctx = _limited(config.ctx, model.ctx, "")
    if not config.vision:
        return Answers(open_instructions(config.data, config.held_out, ctx), config)
    _refuse_base_without(
        model.image_size, "--enable-vision", config.base, "images", "`arbitor train --enable-vision`"
    )
    square = Geometry(size=model.image_size, channels=model.image_channels)
    return Answers(open_captions(config.data, config.held_out, ctx, square), config)


def _settings(config: FinetuneConfig, base: RunConfig) -> RunConfig:
    """What a task reads of its run."""
    return override(
        base, batch=config.batch, accum=1, seed=config.seed, data=config.data, held_out=config.held_out
    )


def _limited(ctx: int | None, most: int, what: str) -> int:
    if ctx is not None and ctx > most:
        unit = f" {what}" if what else ""
        raise UserError(f"--ctx is {ctx}, the base was trained with {most}{unit}; give that or less")
    return most if ctx is None else ctx


def _refuse_base_without(has: int, flag: str, base: str, media: str, maker: str) -> None:
    if not has:
        raise UserError(
            f"{flag}: the base {base} takes no {media}; {maker} makes one, and lets a run grow into one "
            "(--base, or --resume)"
        )
