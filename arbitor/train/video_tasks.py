"""What a run on clips of video trains: the autoencoder, or the flow from noise to latents, given captions.

The flow learns from the latents of the model's own autoencoder, which it leaves as it is.

Shape letters: B clips, L ids, C channels, F frames, S pixels a side, K channels and T, H, W times, rows and
columns of latents.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arbitor.config import RunConfig
from arbitor.data.draw import EpochSampler
from arbitor.data.sampler import random_bits
from arbitor.data.video import Clips, VideoCorpus, write_clips
from arbitor.drawing import autoencoder_of, draw, drawn_ids
from arbitor.evaluate import Evaluation
from arbitor.model import ARBModel
from arbitor.model.arb import ARBOutput
from arbitor.model.sequencer import WINDOW
from arbitor.sidecars.video import LATENT_CHANNELS
from arbitor.train.task import SHOWN

CODEC_NOISE = 0.05  # of latents, whose root mean square is about 1
WITHOUT_CAPTION = 0.1  # share of the clips whose velocity is learnt without a condition
STANDARD_CLIPS = 512  # that the latents are standardised by
REPEATS = 4  # times of the flow at which every held-out clip is measured
_HELD_OUT_KEY, _STANDARD_KEY = 0x0DD, 0x57D


class VideoTask:
    """What the two have in common; see `arbitor.train.task.Task`.

    Args:
        config: of the run.
        corpus: its data.
    """

    unit = "clips"
    main_loss = "video"
    figure = "pixel_error"
    fixed_shapes = True

    def __init__(self, config: RunConfig, corpus: VideoCorpus) -> None:
        model, train = config.model, config.train
        self.corpus = corpus
        self.description = corpus.description
        self.batch = train.batch
        side = model.video_size // model.video_patch
        self.latent_shape = (LATENT_CHANNELS, model.video_frames // model.video_stride, side, side)
        self.bytes_per_item = corpus.train.geometry.bytes
        self.positions_per_item = math.prod(self.latent_shape[1:])
        self.held_out_bytes = len(corpus.held_out) * self.bytes_per_item
        self.sampler = EpochSampler(
            len(corpus.train), train.batch, train.seed, "clips", corpus.train.fingerprint()
        )

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`."""
        raise NotImplementedError

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        raise NotImplementedError

    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """See `Task`."""
        raise NotImplementedError

    def sampler_state(self) -> dict[str, int]:
        """See `Task`."""
        return self.sampler.state()

    def restore_sampler(self, state: Mapping[str, int]) -> None:
        """See `Task`."""
        self.sampler.restore(state)

    def held_out_state(self) -> dict[str, int]:
        """See `Task`."""
        return {"bytes": self.held_out_bytes, "digest": self.corpus.held_out.fingerprint()}

    def show(self, model: ARBModel) -> str:
        """Nothing: clips are no text."""
        return ""

    def write_samples(self, model: ARBModel, folder: Path) -> None:
        """Write pictures that show what was learnt into `folder`."""

    def _drawn(self) -> tuple[np.ndarray, Tensor, np.random.Generator]:
        """Numbers and clips of the next items, and what else is drawn for them comes from."""
        numbers, bits_B = self.sampler.next_numbers()
        clips = torch.from_numpy(self.corpus.train.clips(numbers, bits_B))
        return numbers, clips, np.random.Generator(np.random.Philox(key=[int(bits_B[0]), len(bits_B)]))

    def _num_held_out(self, max_items: int | None) -> int:
        count = len(self.corpus.held_out)
        return count if max_items is None else min(max_items, count)


class VideoCodecTask(VideoTask):
    """The autoencoder: clips in latents and back, measured by the root of the mean square error of pixels."""

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: clips uint8 [B, F, C, S, S], noise for their latents fp32 [B, K, T, H, W]."""
        _, clips, random = self._drawn()
        return clips, CODEC_NOISE * _normal(random, (len(clips), *self.latent_shape))

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        clips, noise = (tensor.to(model.device) for tensor in batch)
        loss = autoencoder_of(model).loss(clips, noise)
        return ARBOutput(loss, loss, {"video": loss})

    @torch.no_grad()
    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """Root of the mean square error (1 is black to white), and that of every pixel's mean."""
        count = self._num_held_out(max_items)
        error, of_mean = pixel_errors(model, self.corpus.held_out, count, self.batch, progress)
        return Evaluation(error, count * self.bytes_per_item, count, extra={"pixel_error_of_mean": of_mean})

    @torch.no_grad()
    def write_samples(self, model: ARBModel, folder: Path) -> None:
        """The first held-out clips, each above what comes back of it."""
        codec = autoencoder_of(model)
        for _, clips in held_out_clips(self.corpus.held_out, self._num_held_out(SHOWN), 1, SHOWN):
            back = codec(clips.to(model.device)).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
            pairs = torch.stack([clips, back], dim=1).flatten(0, 1)
            write_clips(folder / "given-and-coded.png", pairs.numpy())


class FlowTask(VideoTask):
    """The flow: captions to latents, measured by the mean square error of the velocity.

    Times are uniform, spread evenly over a batch from a random beginning. A tenth of the clips are learnt
    with an empty caption, so that a condition can be left out.
    """

    figure = "velocity_loss"

    def __init__(self, config: RunConfig, corpus: VideoCorpus) -> None:
        super().__init__(config, corpus)
        self.length = config.model.video_ids
        most = self.length - WINDOW - 1
        cut = sum(len(caption) > most for caption in corpus.train.captions)
        self.description += f"; {cut:,} captions are cut to {most} bytes" if cut else ""
        self.positions_per_item += self.length

    def prepare(self, model: ARBModel) -> None:
        """Standardise the latents of a model that is about to begin to learn, by training clips."""
        autoencoder_of(model).standardise(self.standard_clips().to(model.device))

    def standard_clips(self) -> Tensor:
        """Training clips that latents are standardised by, uint8 [512, F, C, S, S]; always the same."""
        train = self.corpus.train
        numbers = np.arange(STANDARD_CLIPS) * len(train) // STANDARD_CLIPS
        bits = random_bits(_STANDARD_KEY, np.arange(STANDARD_CLIPS, dtype=np.uint64))
        return torch.from_numpy(train.clips(numbers, bits))

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: ids [B, L], clips uint8 [B, F, C, S, S], noise fp32 [B, K, T, H, W], times fp32 [B]."""
        numbers, clips, random = self._drawn()
        left_out = random.random(len(numbers)) < WITHOUT_CAPTION
        captions = [
            b"" if out else self.corpus.train.captions[n] for n, out in zip(numbers, left_out, strict=True)
        ]
        spread = (random.random() + np.arange(len(numbers)) / len(numbers)) % 1
        noise = _normal(random, (len(numbers), *self.latent_shape))
        return drawn_ids(captions, self.length), clips, noise, torch.from_numpy(spread.astype(np.float32))

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        ids_BL, clips, noise, t_B = (tensor.to(model.device) for tensor in batch)
        return model.flow(ids_BL, autoencoder_of(model).encode(clips), noise, t_B)

    @torch.no_grad()
    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """Mean square error of the velocity, of every clip at four times, all spread evenly from 0 to 1."""
        count = self._num_held_out(max_items)
        total, done = 0.0, 0
        for batch in self.held_out_batches(count):
            total += float(self.output(model, *batch).losses["video"]) * len(batch[0])
            done += len(batch[0])
            if progress is not None:
                progress(done // REPEATS, count)
        return Evaluation(total / done, count * self.bytes_per_item, count)

    def held_out_batches(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches of the first held-out clips, as `next_batch` makes them, but with all captions; always the
        same.

        Args:
            count: clips.
        """
        held_out = self.corpus.held_out
        random = np.random.Generator(np.random.Philox(key=_HELD_OUT_KEY))
        every = torch.from_numpy(
            ((random.permutation(REPEATS * count) + 0.5) / (REPEATS * count)).astype("f")
        )
        first = 0
        for numbers, clips in held_out_clips(held_out, count, REPEATS, self.batch):
            ids_BL = drawn_ids([held_out.captions[n] for n in numbers], self.length)
            noise = _normal(random, (len(numbers), *self.latent_shape))
            yield ids_BL, clips, noise, every[first : first + len(numbers)]
            first += len(numbers)

    def write_samples(self, model: ARBModel, folder: Path) -> None:
        """Clips drawn to the first captions, as a sheet and playing."""
        captions = sorted(set(self.corpus.train.captions))[: 2 * SHOWN]
        clips = draw(model, captions, seed=0).numpy()
        write_clips(folder / "drawn.png", clips)
        write_clips(folder / "drawn.gif", clips)
        (folder / "drawn.txt").write_bytes(b"\n".join(captions) + b"\n")


@torch.no_grad()
def pixel_errors(
    model: ARBModel,
    clips: Clips,
    count: int,
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Roots of the mean square errors of held-out pixels (1 is black to white): behind the autoencoder, and
    of every pixel's mean over these clips.

    Args:
        model: one with an autoencoder.
        clips: what is held out.
        count: things, each with one clip.
        batch: clips at a time.
        progress: called with how many were measured, of how many.
    """
    codec = autoencoder_of(model)
    squares, every = 0.0, []
    for numbers, given in held_out_clips(clips, count, 1, batch):
        squares += float(codec.loss(given.to(model.device))) * len(numbers)
        every.append(given.float() / 255)
        if progress is not None:
            progress(int(numbers[-1]) + 1, count)
    of_mean = float(torch.cat(every).var(dim=0, correction=0).mean().sqrt())
    return math.sqrt(squares / count), of_mean


def held_out_clips(clips: Clips, count: int, repeats: int, batch: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Numbers int64 [B], and clips uint8 [B, F, C, S, S], of the first things; always the same.

    Args:
        clips: what they are made of.
        count: things.
        repeats: clips of each, one after another.
        batch: clips at a time.
    """
    every = np.repeat(np.arange(count), repeats)
    bits = random_bits(_HELD_OUT_KEY, np.arange(len(every), dtype=np.uint64))
    for first in range(0, len(every), batch):
        numbers = every[first : first + batch]
        yield numbers, torch.from_numpy(clips.clips(numbers, bits[first : first + batch]))


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))


VIDEO_TASKS = {"codec": VideoCodecTask, "flow": FlowTask}
