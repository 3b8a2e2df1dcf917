"""What a run trains on: text, or media with captions. A trainer asks its task for batches and evaluations.

Shape letters: B items, L ids.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arbitor.config import RunConfig
from arbitor.data import ByteCorpus, Sampler
from arbitor.data.audio import AudioCorpus, StreamedAudio
from arbitor.data.draw import ImageSampler, moved
from arbitor.data.hub_media import StreamSampler
from arbitor.data.images import CaptionedImage, ImageCorpus, StreamedImages
from arbitor.data.mixed import MixCorpus
from arbitor.data.video import VideoCorpus
from arbitor.evaluate import Evaluation, bits_per_byte, caption_figures
from arbitor.model import ARBModel
from arbitor.model.arb import ARBOutput
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import EOS, PAD

if TYPE_CHECKING:
    from arbitor.train.audio_tasks import AudioTask
    from arbitor.train.mix import MixTask
    from arbitor.train.video_tasks import VideoTask

HELD_OUT_BYTES = 1_000_000  # what the evaluation at the end reads at most
Corpus = ByteCorpus | ImageCorpus | StreamedImages | AudioCorpus | StreamedAudio | MixCorpus | VideoCorpus
SHOWN = 8  # held-out media whose captions are shown at the end


class Task(Protocol):
    """What a `Trainer` needs to know of its data.

    Attributes:
        description: one line for the user.
        main_loss: key of the loss that is shown as the step's.
        figure: what evaluations measure, one of `arbitor.train.metrics.FIGURES`.
        unit: what a batch counts, in words: "bytes" for windows of ctx bytes each, else the medium.
        fixed_shapes: whether every batch has the same shapes, or every one of a kind, which `kind_of` then
            tells from the step's batches by the first tensor of each.
        bytes_per_item: data that one item of a batch reads.
        positions_per_item: positions of the model that it takes, about.
        held_out_bytes: bytes that the evaluation at the end can predict at most.
    """

    description: str
    main_loss: str
    figure: str
    unit: str
    fixed_shapes: bool
    bytes_per_item: int
    positions_per_item: int
    held_out_bytes: int

    def next_batch(self) -> tuple[Tensor, ...]:
        """The next batch, on the host; every time of the same shapes and dtypes."""

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """The model's output, with its loss, on a batch of any device."""

    def sampler_state(self) -> dict[str, Any]:
        """The position in the data, plain JSON values."""

    def restore_sampler(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; UserError if it is one in other data."""

    def held_out_state(self) -> dict[str, int]:
        """What tells the held-out data from other data: `bytes` and `digest`."""

    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """How well the held-out data is predicted, of up to `max_items` windows or media."""


class TextTask:
    """Random windows of a byte stream, measured in bits per byte.

    Args:
        config: of the run.
        corpus: its data.
    """

    unit = "bytes"
    fixed_shapes = True
    main_loss = "text"
    figure = "bits_per_byte"

    def __init__(self, config: RunConfig, corpus: ByteCorpus) -> None:
        self.corpus = corpus
        self.description = corpus.description
        self.bytes_per_item = self.positions_per_item = config.model.ctx
        self.held_out_bytes = len(corpus.held_out)
        self.sampler = Sampler(corpus.train, config.train.batch, config.model.ctx, config.train.seed)

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: ids [B, L]."""
        return (torch.from_numpy(self.sampler.next()),)

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        (ids_BL,) = batch
        return model(ids_BL, targets=ids_BL)

    def sampler_state(self) -> dict[str, int]:
        """See `Task`."""
        return self.sampler.state()

    def restore_sampler(self, state: Mapping[str, int]) -> None:
        """See `Task`."""
        self.sampler.restore(state)

    def held_out_state(self) -> dict[str, int]:
        """See `Task`."""
        return {"bytes": len(self.corpus.held_out), "digest": self.corpus.held_out.fingerprint()}

    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """See `Task`."""
        # A copy: a view of a file would be read long after the file was looked at.
        data = np.array(self.corpus.held_out.as_array(HELD_OUT_BYTES))
        return bits_per_byte(model, data, self.bytes_per_item, max_windows=max_items, progress=progress)


class CaptionTask:
    """Images ahead of their captions; the loss is of the captions' bytes and of the EOS behind them.

    Measured in bits per byte of held-out captions, EOS counted as one, and as the share of captions that the
    model writes right, byte for byte, when it always takes the likeliest.

    Args:
        config: of the run.
        corpus: its data.
    """

    unit = "images"
    fixed_shapes = True
    main_loss = "text"
    figure = "bits_per_byte"

    def __init__(self, config: RunConfig, corpus: ImageCorpus | StreamedImages) -> None:
        self.corpus = corpus
        self.ctx = config.model.ctx
        self.batch = config.train.batch
        streams = isinstance(corpus, StreamedImages)
        # What is to come of a stream is not known: those that are held out stand for it.
        captions = (corpus.held_out if isinstance(corpus, StreamedImages) else corpus.train).captions
        cut = sum(len(caption) > self.ctx - WINDOW - 1 for caption in captions)
        which = f"{cut:,} of the captions that are held out" if streams else f"{cut:,} captions"
        told = f"; {which} are cut to the context of {self.ctx} bytes" if cut else ""
        self.description = corpus.description + told
        longest = min(WINDOW + max(map(len, captions)) + 1, self.ctx)
        # Every batch as wide as the longest caption, so that what a step costs does not depend on its draw.
        self.length = None if streams else longest
        self.fixed_shapes = not streams
        self.bytes_per_item = corpus.train.geometry.bytes + longest - WINDOW
        patches = (config.model.image_size // config.model.image_patch) ** 2
        self.positions_per_item = patches + longest
        self.held_out_bytes = sum(self._counted(caption) for caption in corpus.held_out.captions)
        self.augment = config.data.augment
        seed = config.train.seed
        self.sampler: ImageSampler | StreamSampler[CaptionedImage]
        if isinstance(corpus, StreamedImages):
            self.sampler = StreamSampler(corpus.train.media, self.batch, seed)
        else:
            self.sampler = ImageSampler(corpus.train, self.batch, seed, augment=self.augment)
            self._captions = corpus.train.captions

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: ids [B, L], which of them count [B, L], and pixels."""
        if isinstance(self.sampler, StreamSampler):
            items, bits = self.sampler.next_items()
            captions = [caption for caption, _ in items]
            pixels = torch.from_numpy(np.stack([image for _, image in items]))
            pixels = moved(pixels, bits) if self.augment else pixels
        else:
            numbers, pixels = self.sampler.next()
            captions = [self._captions[n] for n in numbers]
        return *framed(captions, self.ctx, self.length), pixels

    def news(self) -> list[str]:
        """Lines for the user about what happened to the data since they were last asked for."""
        return self.sampler.news() if isinstance(self.sampler, StreamSampler) else []

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        ids_BL, mask_BL, pixels = batch
        return model(ids_BL, targets=ids_BL, prefix=model.encode("image", pixels), target_mask=mask_BL)

    def sampler_state(self) -> dict[str, int]:
        """See `Task`."""
        return self.sampler.state()

    def restore_sampler(self, state: Mapping[str, int]) -> None:
        """See `Task`."""
        self.sampler.restore(state)

    def held_out_state(self) -> dict[str, int]:
        """See `Task`."""
        return {"bytes": self.held_out_bytes, "digest": self.corpus.held_out.fingerprint()}

    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """See `Task`."""
        held_out = self.corpus.held_out
        count = len(held_out) if max_items is None else min(max_items, len(held_out))

        def batches() -> Any:
            for first in range(0, count, self.batch):
                numbers = np.arange(first, min(first + self.batch, count))
                captions = [held_out.captions[n] for n in numbers]
                yield torch.from_numpy(held_out.images(numbers)), captions, *framed(captions, self.ctx)

        return caption_figures(model, "image", batches(), count, progress)

    def held_out_batch(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """Some of the held-out images as `output` takes them."""
        held_out = self.corpus.held_out
        captions = [held_out.captions[n] for n in numbers]
        return *framed(captions, self.ctx), torch.from_numpy(held_out.images(np.array(numbers)))

    def show(self, model: ARBModel) -> str:
        """What the model says of the first held-out images, a line each."""
        from arbitor.generate import greedy_texts

        held_out = self.corpus.held_out
        numbers = np.arange(min(SHOWN, len(held_out)))
        lines = []
        with torch.no_grad():
            prefix = model.encode("image", torch.from_numpy(held_out.images(numbers)))
            texts = greedy_texts(model, prefix, max(len(held_out.captions[n]) for n in numbers) + 1)
        for n, text in zip(numbers, texts, strict=True):
            said, wanted = (t.decode("utf-8", "replace") for t in (text, held_out.captions[n]))
            lines.append(f"{said}" if said == wanted else f"{said}  (it is: {wanted})")
        return "\n".join(lines)

    def _counted(self, caption: bytes) -> int:
        return min(len(caption) + 1, self.ctx - WINDOW)


def task_of(config: RunConfig, corpus: Corpus) -> "TextTask | CaptionTask | AudioTask | MixTask | VideoTask":
    """The task that belongs to some data."""
    if isinstance(corpus, MixCorpus):
        from arbitor.train.mix import MixTask

        return MixTask(config, corpus)
    if isinstance(corpus, AudioCorpus | StreamedAudio):
        from arbitor.train.audio_tasks import AUDIO_TASKS

        return AUDIO_TASKS[config.data.audio_task](config, corpus)
    if isinstance(corpus, VideoCorpus):
        from arbitor.train.video_tasks import VIDEO_TASKS

        return VIDEO_TASKS[config.data.video_task](config, corpus)
    if isinstance(corpus, ImageCorpus | StreamedImages):
        return CaptionTask(config, corpus)
    return TextTask(config, corpus)


def framed(captions: Sequence[bytes], ctx: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Captions as ids: three PAD, the bytes, EOS, filled up with PAD on the right, cut to `ctx`.

    Args:
        captions: B texts.
        ctx: most ids.
        length: L; None is what the longest caption needs.

    Returns:
        ids int64 [B, L], and bool [B, L]: which of them are to be learnt, the bytes and EOS.
    """
    needed = min(ctx, WINDOW + 1 + max(map(len, captions)))
    length = needed if length is None else length
    ids_BL = torch.full((len(captions), length), PAD, dtype=torch.int64)
    mask_BL = torch.zeros((len(captions), length), dtype=torch.bool)
    for row, caption in enumerate(captions):
        ids = torch.tensor([*caption, EOS])[: length - WINDOW]
        ids_BL[row, WINDOW : WINDOW + len(ids)] = ids
        mask_BL[row, WINDOW : WINDOW + len(ids)] = True
    return ids_BL, mask_BL
