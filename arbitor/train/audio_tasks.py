"""What a run on recordings trains: the codec, listening (sound to text) or speaking (text to sound).

Listening and speaking learn from the codes of the model's own codec, which they leave as it is.

Shape letters: B recordings, N samples, T times, Q codes of a time, L ids.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arbitor.config import RunConfig
from arbitor.data.audio import AudioCorpus, Recording, Recordings, StreamedAudio, recordings_of
from arbitor.data.clips import LOUD_NOISE, clip, varied, with_gap
from arbitor.data.draw import EpochSampler
from arbitor.data.hub_media import StreamSampler
from arbitor.data.waves import resample, write_recording
from arbitor.evaluate import Evaluation, caption_figures
from arbitor.generate import greedy_texts
from arbitor.model import ARBModel
from arbitor.model.arb import ARBOutput
from arbitor.model.sequencer import WINDOW
from arbitor.sidecars.audio import FRAMES_PER_SECOND, STRIDE, levelled
from arbitor.sidecars.spectrum import METRIC_RATE, metric_mel
from arbitor.speech import codec_of, say, spoken_ids
from arbitor.train.task import SHOWN, framed

CODEC_SECONDS = 0.5  # of a clip that the codec learns from; most of a longer one of a word would be silence


class AudioTask:
    """What the three have in common; see `arbitor.train.task.Task`.

    Args:
        config: of the run.
        corpus: its data.
    """

    unit = "recordings"
    main_loss = "audio"
    figure = "bits_per_byte"
    fixed_shapes = True

    def __init__(self, config: RunConfig, corpus: AudioCorpus | StreamedAudio) -> None:
        model, train = config.model, config.train
        self.corpus = corpus
        self.samples = model.audio_samples
        self.ctx = model.ctx
        self.batch = train.batch
        self.augment = config.data.augment
        self.rate = model.audio_rate
        self.streams = isinstance(corpus, StreamedAudio)
        # What is to come of a stream is not known: those that are held out stand for it.
        self.known = corpus.held_out if isinstance(corpus, StreamedAudio) else corpus.train
        cut = sum(len(wave) > self.samples for wave in self.known.waves)
        which = f"{cut:,} of those held out" if self.streams else f"{cut:,}"
        told = f"; {which} are cut to {self.samples / self.rate:.2g} s" if cut else ""
        self.description = corpus.description + told
        self.bytes_per_item = 2 * self.samples
        self.positions_per_item = math.ceil(50 * self.samples / self.rate)
        self.held_out_bytes = 2 * corpus.held_out.num_samples
        self.sampler: EpochSampler | StreamSampler[Recording]
        if isinstance(corpus, StreamedAudio):
            self.sampler = StreamSampler(corpus.train.media, train.batch, train.seed)
        else:
            count, fingerprint = len(corpus.train), corpus.train.fingerprint()
            self.sampler = EpochSampler(count, train.batch, train.seed, "recordings", fingerprint)

    def varied(self, wave: np.ndarray, bits: int) -> np.ndarray:
        """A recording fp32 [N] as it might be at another time, by 48 random bits."""
        return varied(wave, bits)

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
        """What the model makes of the first held-out recordings, in words."""
        return ""

    def write_samples(self, model: ARBModel, folder: Path) -> None:
        """Write WAV files that show what was learnt into `folder`."""

    def news(self) -> list[str]:
        """Lines for the user about what happened to the data since they were last asked for."""
        return self.sampler.news() if isinstance(self.sampler, StreamSampler) else []

    def _next(self) -> tuple[Recordings, np.ndarray]:
        """The next recordings, and 64 random bits for each, uint64 [B]."""
        if isinstance(self.sampler, StreamSampler):
            items, bits_B = self.sampler.next_items()
            return recordings_of(items, self.rate), bits_B
        numbers, bits_B = self.sampler.next_numbers()
        return self.known.part(numbers.tolist()), bits_B

    def _drawn(self, samples: int) -> tuple[list[bytes], list[np.ndarray]]:
        """Labels and clips of the next recordings."""
        drawn, bits_B = self._next()
        clips = []
        for number, bits in enumerate(bits_B.tolist()):
            wave = drawn.wave(number)
            if self.augment:
                wave = self.varied(wave, bits & (1 << 48) - 1)
            clips.append(clip(wave, samples, bits >> 48))
        return drawn.labels, clips

    def _held_out(self, max_items: int | None) -> Recordings:
        held_out = self.corpus.held_out
        return held_out if max_items is None else held_out.part(range(min(max_items, len(held_out))))


class CodecTask(AudioTask):
    """The codec: clips in codes and back, measured by the distance of 80 log-mel bands at 16 kHz."""

    figure = "log_mel_distance"

    def __init__(self, config: RunConfig, corpus: AudioCorpus | StreamedAudio) -> None:
        super().__init__(config, corpus)
        self.description = corpus.description
        self.clip_samples = min(self.samples, round(CODEC_SECONDS * self.rate))
        self.bytes_per_item = 2 * self.clip_samples
        self.positions_per_item = math.ceil(100 * self.clip_samples / self.rate)

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: fp32 [B, N]."""
        _, clips = self._drawn(self.clip_samples)
        return (torch.from_numpy(np.stack(clips)),)

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        (clips_BN,) = batch
        loss, output = codec_of(model).loss(clips_BN.to(model.device))
        return ARBOutput(output.wave, loss, {"audio": loss})

    @torch.no_grad()
    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """Mean L1 distance of log-mel magnitudes, and that of each band's median over these recordings."""
        held_out, codec = self._held_out(max_items), codec_of(model)
        bands, distances = [], []
        for number in range(len(held_out)):
            wave = held_out.wave(number)
            back = codec(torch.from_numpy(wave)[None].to(model.device)).wave[0].cpu().numpy()
            right, made = (metric_bands(w, self.rate) for w in (wave, back))
            bands.append(right)
            distances.append((made - right).abs())
            if progress is not None:
                progress(number + 1, len(held_out))
        every = torch.cat(bands)
        of_median = float((every - every.median(dim=0).values).abs().mean())
        distance = float(torch.cat(distances).mean())
        extra = {"log_mel_distance_of_median": of_median}
        if of_median:  # 0 of silence and of single windows
            extra["share_of_median"] = distance / of_median
        return Evaluation(distance, 2 * held_out.num_samples, len(held_out), extra=extra)

    @torch.no_grad()
    def write_samples(self, model: ARBModel, folder: Path) -> None:
        """The first held-out recordings, and what comes back of them."""
        held_out = self._held_out(SHOWN)
        for number in range(len(held_out)):
            wave = held_out.wave(number)
            back = codec_of(model)(torch.from_numpy(wave)[None].to(model.device)).wave[0].cpu().numpy()
            for name, samples in (("given", wave), ("coded", back)):
                write_recording(folder / f"{number}-{name}.wav", samples, self.rate)


class ListenTask(AudioTask):
    """Sounds ahead of their labels, measured as captions of images are."""

    main_loss = "text"

    def __init__(self, config: RunConfig, corpus: AudioCorpus | StreamedAudio) -> None:
        super().__init__(config, corpus)
        longest = min(WINDOW + max(map(len, self.known.labels)) + 1, self.ctx)
        self.length = None if self.streams else longest
        self.fixed_shapes = not self.streams
        self.positions_per_item += longest
        self.held_out_bytes = sum(min(len(label) + 1, self.ctx - WINDOW) for label in corpus.held_out.labels)

    def varied(self, wave: np.ndarray, bits: int) -> np.ndarray:
        """See `AudioTask`; with more noise, and a part may be silent."""
        return with_gap(varied(wave, bits, LOUD_NOISE), bits)

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: ids [B, L], which of them count [B, L], and clips fp32 [B, N]."""
        labels, clips = self._drawn(self.samples)
        return *framed(labels, self.ctx, self.length), torch.from_numpy(np.stack(clips))

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        ids_BL, mask_BL, clips_BN = batch
        prefix = model.encode("audio", clips_BN)
        return model(ids_BL, targets=ids_BL, prefix=prefix, target_mask=mask_BL)

    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """See `Task`."""
        held_out = self._held_out(max_items)

        def batches() -> Any:
            for first in range(0, len(held_out), self.batch):
                labels = held_out.labels[first : first + self.batch]
                yield self._clips(held_out, first), labels, *framed(labels, self.ctx)

        return caption_figures(model, "audio", batches(), len(held_out), progress)

    @torch.no_grad()
    def show(self, model: ARBModel) -> str:
        """See `AudioTask`."""
        held_out = self._held_out(SHOWN)
        prefix = model.encode("audio", self._clips(held_out, 0))
        texts = greedy_texts(model, prefix, max(map(len, held_out.labels)) + 1)
        lines = []
        for text, label in zip(texts, held_out.labels, strict=False):
            heard, said = (t.decode("utf-8", "replace") for t in (text, label))
            lines.append(heard if heard == said else f"{heard}  (it is: {said})")
        return "\n".join(lines)

    def _clips(self, recordings: Recordings, first: int) -> Tensor:
        """fp32 [B, N] of some neighbours."""
        numbers = range(first, min(first + self.batch, len(recordings)))
        return torch.from_numpy(np.stack([clip(recordings.wave(n), self.samples) for n in numbers]))


class SpeakTask(AudioTask):
    """Labels ahead of their sounds, measured in bits per code of the held-out ones.

    Sounds are equally loud and not varied: the model would learn to speak with noise.
    """

    figure = "bits_per_code"
    fixed_shapes = False  # a batch is as long as its longest recording

    def __init__(self, config: RunConfig, corpus: AudioCorpus | StreamedAudio) -> None:
        super().__init__(config, corpus)
        self.positions_per_item += WINDOW + 1 + max(map(len, self.known.labels))
        self.codes_per_time = config.model.audio_codes
        self.samples_per_time = STRIDE * self.rate // FRAMES_PER_SECOND

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: ids [B, L], how many times of codes each has [B], and recordings fp32 [B, N]."""
        return self._batch_of(self._next()[0])

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        ids_BL, times_B, waves_BN = batch
        return model.speak(ids_BL, codec_of(model).encode(levelled(waves_BN.to(model.device))), times_B)

    @torch.no_grad()
    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """Cross entropy of the right codes, each predicted from those before it."""
        held_out = self._held_out(max_items)
        bits = codes = 0.0
        done = 0
        for batch in self.held_out_batches(max_items):
            output = self.output(model, *batch)
            count = sum(self.codes_per_time * times + 1 for times in batch[1].tolist())
            bits += float(output.losses["audio"]) * count / math.log(2)
            codes += count
            done += len(batch[0])
            if progress is not None:
                progress(done, len(held_out))
        return Evaluation(bits / codes, 2 * held_out.num_samples, len(held_out))

    def held_out_batches(self, max_items: int | None) -> Iterator[tuple[Tensor, ...]]:
        """Up to `max_items` held-out recordings as `output` takes them."""
        held_out = self._held_out(max_items)
        for first in range(0, len(held_out), self.batch):
            yield self._batch_of(held_out.part(range(first, min(first + self.batch, len(held_out)))))

    def write_samples(self, model: ARBModel, folder: Path) -> None:
        """The first labels, spoken."""
        labels = sorted(set(self.known.labels))[: 2 * SHOWN]
        for label, wave in zip(labels, say(model, labels, seed=0), strict=True):
            name = "".join(c if c.isalnum() else "-" for c in label.decode("utf-8", "replace"))[:40]
            write_recording(folder / f"{name}.wav", wave, self.rate)

    def _batch_of(self, recordings: Recordings) -> tuple[Tensor, Tensor, Tensor]:
        waves = [recordings.wave(n)[: self.samples] for n in range(len(recordings))]
        times = [math.ceil(len(wave) / self.samples_per_time) for wave in waves]
        longest = max(map(len, waves))
        padded = np.stack([np.pad(wave, (0, longest - len(wave))) for wave in waves])
        return spoken_ids(recordings.labels), torch.tensor(times), torch.from_numpy(padded)


def metric_bands(wave: np.ndarray, rate: int) -> Tensor:
    """What a waveform fp32 [N] is measured by: `metric_mel` at its rate, [F, 80]."""
    return metric_mel(torch.from_numpy(resample(wave, rate, METRIC_RATE))[None])[0]


AUDIO_TASKS = {"codec": CodecTask, "listen": ListenTask, "speak": SpeakTask}
