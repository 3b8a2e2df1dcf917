"""Mixed pretraining: every micro-batch is of one modality, drawn by the weights of the mix.

A part is a task of its own, with its own data; `MixTask` draws which of them the next micro-batch is of. Draw
n is a function of (seed, n), so a resumed run draws what an uninterrupted one does. With `--accum` above 1,
a step is made of several draws.

One more modality is a class in `PARTS`, what opens its data in `arbitor.data.mixed.OPENERS`, and, if it has a
sidecar, the fields that `arbitor.pretrain_command` sets for it.

Shape letters: B items, L ids, T times, Q codes, F frames, C channels, S pixels a side.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arbitor.config import RunConfig
from arbitor.data import ByteCorpus
from arbitor.data.documents import Documents, DocumentSampler, Stretches
from arbitor.data.mixed import HubText, MixCorpus
from arbitor.data.sampler import random_bits
from arbitor.data.video import VideoCorpus
from arbitor.drawing import autoencoder_of
from arbitor.errors import UserError
from arbitor.evaluate import Evaluation
from arbitor.model import ARBModel
from arbitor.model.arb import ARBOutput
from arbitor.model.ledger import reset_runtime_state
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import EOS
from arbitor.sidecars.audio import levelled
from arbitor.speech import codec_of
from arbitor.train.audio_tasks import SpeakTask
from arbitor.train.gaussian import Gaussian
from arbitor.train.metrics import FIGURES
from arbitor.train.task import HELD_OUT_BYTES, CaptionTask, Task, TextTask
from arbitor.train.video_tasks import CODEC_NOISE, FlowTask, pixel_errors

_MIX_KEY = 0x317
MAIN = "mixed"
FOLLOWING = 0.25  # of the way to a batch's constants, while an autoencoder learns
BASELINES = {"unigram": "unigrams", "gaussian": "a Gaussian"}  # in words
ROUTER_ITEMS = 16  # held-out items of a modality that the router's accuracy is measured on


class Part(Protocol):
    """One modality of a mix. What `PARTS` names is made of (config of the run, corpus of the modality).

    Attributes:
        beside: what `baseline` is, of `BASELINES`.
    """

    beside: str

    @property
    def task(self) -> Task:
        """Its batches and evaluations."""

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """The model's output on a batch of the task, with its loss, and that of `task.main_loss` in it."""

    def baseline(self, model: ARBModel, measured: Evaluation) -> float:
        """The task's figure on the held-out data that was `measured`, for a predictor that knows how frequent
        each value is and nothing else: the entropy of unigrams of that data, in bits, or the velocity loss of
        a Gaussian.
        """

    def held_out_batches(self, max_items: int) -> Iterator[tuple[Tensor, ...]]:
        """Held-out data as `output` takes it, of up to `max_items` items."""


class WindowsTask(TextTask):
    """Consecutive windows of documents; measured as `TextTask` is.

    With `preserve_state`, a window is read behind the KV ledger of as many ids ahead of it in its document;
    at the beginning of one the ledger is empty but for PAD. The ledger is made anew in every step, by the
    weights of that step: so no floats outlive a step, and a resumed run is equal to an uninterrupted one.

    Args:
        config: of the run.
        corpus: its held-out data, and its training data unless `documents` are given.
        documents: to learn from; None is the corpus in one stretch a row.
    """

    def __init__(self, config: RunConfig, corpus: ByteCorpus, documents: Documents | None) -> None:
        batch, ctx = config.train.batch, config.model.ctx
        self.corpus = corpus
        self.description = corpus.description
        self.bytes_per_item = ctx
        self._preserves = config.mix.preserve_state
        self.positions_per_item = 2 * ctx if self._preserves else ctx
        self.held_out_bytes = len(corpus.held_out)
        self._windows = DocumentSampler(
            Stretches(corpus.train, batch) if documents is None else documents,
            batch,
            ctx,
            with_context=self._preserves,
        )

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: ids [B, L], which count [B, L], and with `preserve_state` their context [B, L]."""
        windows = [torch.from_numpy(part) for part in self._windows.next()]
        return tuple(windows if self._preserves else windows[:2])

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        ids_BL, mask_BL, *context = batch
        if not context:
            return model(ids_BL, targets=ids_BL, target_mask=mask_BL)
        return model(ids_BL, targets=ids_BL, target_mask=mask_BL, context=context[0])

    def sampler_state(self) -> dict[str, Any]:
        """See `Task`."""
        return self._windows.state()

    def restore_sampler(self, state: Mapping[str, Any]) -> None:
        """See `Task`."""
        self._windows.restore(state)

    def news(self) -> list[str]:
        """Lines for the user about what happened to the data since they were last asked for."""
        return self._windows.news()


class TextPart:
    """Text or source code: random windows of bytes, or those of documents in their order."""

    beside = "unigram"

    def __init__(self, config: RunConfig, corpus: ByteCorpus | HubText) -> None:
        self.task: TextTask
        if isinstance(corpus, HubText):
            self.task = WindowsTask(config, corpus.corpus, corpus.documents)
        elif config.mix.preserve_state:
            self.task = WindowsTask(config, corpus, None)
        else:
            self.task = TextTask(config, corpus)
        self._ctx = config.model.ctx

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Part`."""
        return self.task.output(model, *batch)

    def baseline(self, model: ARBModel, measured: Evaluation) -> float:
        """See `Part`."""
        data = np.asarray(self.task.corpus.held_out.as_array(HELD_OUT_BYTES))
        return entropy(np.bincount(data, minlength=256))

    def held_out_batches(self, max_items: int) -> Iterator[tuple[Tensor, ...]]:
        """See `Part`."""
        held_out = self.task.corpus.held_out
        last = min(max_items * self._ctx, len(held_out)) - self._ctx
        offsets = np.arange(0, last + 1, self._ctx, dtype=np.int64)
        ids_BL = torch.from_numpy(held_out.windows(offsets, self._ctx).astype(np.int64))
        yield (ids_BL, torch.ones_like(ids_BL, dtype=torch.bool)) if self._masked else (ids_BL,)

    @property
    def _masked(self) -> bool:
        return isinstance(self.task, WindowsTask)


class ImagePart:
    """Images ahead of their captions."""

    beside = "unigram"

    def __init__(self, config: RunConfig, corpus: Any) -> None:
        self.task = CaptionTask(config, corpus)

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Part`."""
        return self.task.output(model, *batch)

    def baseline(self, model: ARBModel, measured: Evaluation) -> float:
        """See `Part`; the ids that are counted are the captions' bytes and EOS."""
        most = self.task.ctx - WINDOW
        ids = [[*caption, EOS][:most] for caption in self.task.corpus.held_out.captions[: measured.windows]]
        return entropy(np.bincount(np.concatenate(ids)))

    def held_out_batches(self, max_items: int) -> Iterator[tuple[Tensor, ...]]:
        """See `Part`."""
        yield self.task.held_out_batch(range(min(max_items, len(self.task.corpus.held_out))))


class AudioPart:
    """Texts ahead of the codes of their sounds, and the codec that makes those codes.

    Unless `train_codec` is off (the codec was trained before), the codec learns from the same recordings, by
    a loss that reaches no other part: codes are integers. What is to be predicted then moves while it learns,
    so the baseline is measured anew each time, on the codes of that moment.
    """

    beside = "unigram"

    def __init__(self, config: RunConfig, corpus: Any) -> None:
        self.task = SpeakTask(config, corpus)
        self._trains_codec = config.mix.train_codec

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Part`."""
        spoken = self.task.output(model, *batch)
        if not self._trains_codec or not torch.is_grad_enabled():
            return spoken
        waves_BN = batch[2]
        codec, _ = codec_of(model).loss(levelled(waves_BN.to(model.device)))
        assert spoken.loss is not None
        losses = {**spoken.losses, "codec": codec}
        return ARBOutput(spoken.logits, spoken.loss + codec, losses, spoken.modalities)

    def baseline(self, model: ARBModel, measured: Evaluation) -> float:
        """See `Part`; each code of a time has its own frequencies, and the end is a value of the first."""
        codec = codec_of(model)
        counts_QV = np.zeros((codec.num_codes, codec.num_values + 1), dtype=np.int64)
        for _, times_B, waves_BN in self.held_out_batches(measured.windows):
            codes_BTQ = codec.encode(levelled(waves_BN.to(model.device))).cpu()
            for codes_TQ, times in zip(codes_BTQ, times_B.tolist(), strict=True):
                for q in range(codec.num_codes):
                    counts_QV[q] += np.bincount(codes_TQ[:times, q], minlength=codec.num_values + 1)
                counts_QV[0, codec.num_values] += 1
        sizes_Q = counts_QV.sum(axis=1)
        bits = [entropy(counts_V) * size for counts_V, size in zip(counts_QV, sizes_Q, strict=True)]
        return math.fsum(bits) / int(sizes_Q.sum())

    def held_out_batches(self, max_items: int) -> Iterator[tuple[Tensor, ...]]:
        """See `Part`."""
        return self.task.held_out_batches(max_items)


class VideoPart:
    """Captions, from which a flow draws the latents of their clips, and the autoencoder of those latents.

    As in `AudioPart`, the autoencoder learns along from the same clips unless `train_autoencoder` is off or
    it is a frozen one, by a loss that reaches no other part. The constants that standardise its latents then
    follow it, by a quarter of the way to those of each batch.
    """

    beside = "gaussian"

    def __init__(self, config: RunConfig, corpus: VideoCorpus) -> None:
        self.task = FlowTask(config, corpus)
        self._trains_autoencoder = config.trains_autoencoder

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Part`."""
        if not self._trains_autoencoder or not torch.is_grad_enabled():
            return self.task.output(model, *batch)
        codec = autoencoder_of(model)
        clips, noise = (tensor.to(model.device) for tensor in batch[1:3])
        codec.standardise(clips, FOLLOWING)
        drawn = self.task.output(model, *batch)
        pixels = codec.loss(clips, CODEC_NOISE * noise)
        assert drawn.loss is not None
        losses = {**drawn.losses, "autoencoder": pixels}
        return ARBOutput(drawn.logits, drawn.loss + pixels, losses, drawn.modalities)

    @torch.no_grad()
    def baseline(self, model: ARBModel, measured: Evaluation) -> float:
        """See `Part`; every number of a clip's latents has a mean and a variance of its own, those in
        training clips.
        """
        codec = autoencoder_of(model)
        gaussian = Gaussian.of(codec.encode(self.task.standard_clips().to(model.device)), full=False)
        total, count = 0.0, 0
        for _, clips, noise, t_B in self.held_out_batches(measured.windows):
            latents = codec.encode(clips.to(model.device))
            noise, t_B = noise.to(model.device), t_B.to(model.device)
            time = t_B[:, None, None, None, None]
            velocity = gaussian.velocity((1 - time) * noise + time * latents, t_B)
            total += float((velocity - (latents - noise)).square().mean()) * len(clips)
            count += len(clips)
        return total / count

    def more(self, model: ARBModel, measured: Evaluation) -> dict[str, float]:
        """Error of held-out pixels behind the autoencoder; see `arbitor.train.video_tasks.pixel_errors`."""
        error, of_mean = pixel_errors(model, self.task.corpus.held_out, measured.windows, self.task.batch)
        return {"held_out_pixel_error": error, "pixel_error_of_mean": of_mean}

    def held_out_batches(self, max_items: int) -> Iterator[tuple[Tensor, ...]]:
        """See `Part`."""
        return self.task.held_out_batches(min(max_items, len(self.task.corpus.held_out)))


PARTS: dict[str, Callable[[RunConfig, Any], Part]] = {
    "text": TextPart,
    "code": TextPart,
    "image": ImagePart,
    "audio": AudioPart,
    "video": VideoPart,
}
"""What makes the part of a modality; `arbitor.data.mixed.OPENERS` has the data that belongs to it."""


class MixTask:
    """Micro-batches of several modalities; see `arbitor.train.task.Task`.

    A batch begins with the number of its modality, int64, among those of the mix. Losses and figures of a
    modality carry its name: "loss_text", "router_accuracy_audio" while training, and "held_out_text",
    "unigram_text" (of clips: "gaussian_video") and "held_out_router_text" when measured. What a step shows as
    its loss is that of what it drew, in nats per byte or code, or the velocity loss; what an evaluation is
    compared by is the mean of the parts' figures, weighted as they are drawn.

    Args:
        config: of the run.
        corpus: its data.
    """

    unit = "items"
    main_loss = MAIN

    def __init__(self, config: RunConfig, corpus: MixCorpus) -> None:
        self.names = list(corpus.parts)
        self.parts = {name: PARTS[name](config, part) for name, part in corpus.parts.items()}
        self.weights = [config.mix.weight(name) for name in self.names]
        self._batch = config.train.batch
        self._seed = config.train.seed
        self._drawn = 0
        fixed = [part.task.fixed_shapes for part in self.parts.values()]
        self._fixed = dict(enumerate(fixed)) if config.train.accum == 1 else {}
        self.fixed_shapes = any(self._fixed.values())
        apart = [name for name, same in zip(self.names, fixed, strict=True) if not same]
        self.how_replayed = "replayed as one CUDA graph for each modality" + (
            f", but for {' and '.join(apart)}, whose batches differ in shape" if apart else ""
        )
        whole = sum(map(Fraction, self.weights))
        self._shares = [Fraction(weight) / whole for weight in self.weights]
        edges = [sum(self._shares[: n + 1], Fraction(0)) for n in range(len(self.names))]
        self._edges = [int(edge * (1 << 64)) for edge in edges]
        tasks = [part.task for part in self.parts.values()]
        self.description = "; ".join(
            f"{name} {float(share):.0%}: {task.description}"
            for name, share, task in zip(self.names, self._shares, tasks, strict=True)
        )
        self.bytes_per_item = round(self._mean([task.bytes_per_item for task in tasks]))
        self.positions_per_item = max(task.positions_per_item for task in tasks)
        self.held_out_bytes = sum(task.held_out_bytes for task in tasks)
        self.figure = "mixed" if "video" in self.parts else "mixed_bits"
        if {"audio", "video"} & self.parts.keys():
            self.write_samples: Callable[[ARBModel, Path], None] = self._write_samples
        if isinstance(video := self.parts.get("video"), VideoPart):
            self.prepare: Callable[[ARBModel], None] = video.task.prepare

    def next_batch(self) -> tuple[Tensor, ...]:
        """See `Task`: the modality's number, and what its task gives."""
        bits = int(random_bits(self._seed ^ _MIX_KEY, np.array([self._drawn], dtype=np.uint64))[0])
        self._drawn += 1
        number = next(n for n, edge in enumerate(self._edges) if bits < edge)
        return torch.tensor(number), *self.parts[self.names[number]].task.next_batch()

    def kind_of(self, batches: Sequence[Sequence[Tensor]]) -> int | None:
        """What a step is of if all steps of that modality are alike: its number; else None.

        With several micro-batches a step there are too many mixtures for each to be one kind.
        """
        number = int(batches[0][0])
        return number if self._fixed.get(number, False) else None

    def output(self, model: ARBModel, *batch: Tensor) -> ARBOutput:
        """See `Task`."""
        number, *rest = batch
        name = self.names[int(number)]
        part = self.parts[name]
        reset_runtime_state(model)  # no batch may see what another one, or a sample, left behind
        output = part.output(model, *rest)
        losses = dict(output.losses)
        main = losses.pop(part.task.main_loss)
        losses |= {MAIN: main, f"loss_{name}": main}
        if (accuracy := model.part_metrics().get("router_accuracy")) is not None:
            losses[f"router_accuracy_{name}"] = accuracy
        return ARBOutput(output.logits, output.loss, losses, output.modalities)

    def evaluate(
        self, model: ARBModel, max_items: int | None, progress: Callable[[int, int], None] | None
    ) -> Evaluation:
        """See `Task`; the items are counted for each modality."""
        figures, extra = [], {}
        right = None
        num_bytes = items = 0
        for name, part in self.parts.items():
            result = part.task.evaluate(model, max_items, progress)
            figures.append(result.bits_per_byte)
            extra[f"held_out_{name}"] = result.bits_per_byte
            extra[f"{part.beside}_{name}"] = part.baseline(model, result)
            if isinstance(part, VideoPart):
                extra |= part.more(model, result)
            if (accuracy := self._router_accuracy(model, part)) is not None:
                extra[f"held_out_router_{name}"] = accuracy
            right = result.captions_right if result.captions_right is not None else right
            num_bytes += result.num_bytes
            items += result.windows
        return Evaluation(self._mean(figures), num_bytes, items, right, extra)

    def news(self) -> list[str]:
        """Lines for the user about what happened to the data since they were last asked for."""
        return [line for part in self.parts.values() for line in getattr(part.task, "news", list)()]

    def sampler_state(self) -> dict[str, Any]:
        """See `Task`: draws so far, and the state of every part's sampler."""
        parts = {name: part.task.sampler_state() for name, part in self.parts.items()}
        return {"seed": self._seed, "drawn": self._drawn, "parts": parts}

    def restore_sampler(self, state: Mapping[str, Any]) -> None:
        """See `Task`."""
        drawn, parts = state.get("drawn"), state.get("parts")
        if type(drawn) is not int or drawn < 0 or not isinstance(parts, dict) or set(parts) != {*self.names}:
            raise UserError(
                f"the sampler state is not one of a mix of {', '.join(self.names)} (start a new run)"
            )
        self._drawn = drawn
        for name, part in self.parts.items():
            try:
                part.task.restore_sampler(parts[name])
            except UserError as error:
                raise UserError(f"{name}: {error}") from error

    def held_out_state(self) -> dict[str, int]:
        """See `Task`."""
        states = [part.task.held_out_state() for part in self.parts.values()]
        digest = hashlib.blake2b(repr([(s["bytes"], s["digest"]) for s in states]).encode(), digest_size=8)
        return {
            "bytes": sum(state["bytes"] for state in states),
            "digest": int.from_bytes(digest.digest(), "little") >> 1,
        }

    def show(self, model: ARBModel) -> str:
        """What the parts have to show, each under its name: text from nothing, captions of images."""
        shown = []
        for name, part in self.parts.items():
            task = part.task
            text = ""
            if isinstance(task, TextTask):
                prompt = bytes(task.corpus.held_out.as_array(SHOWN_BYTES))
                said = model.generate(prompt, SHOWN_BYTES, seed=self._seed)
                text = (prompt + said).decode("utf-8", "replace")
            elif (show := getattr(task, "show", None)) is not None:
                text = show(model)
            if text:
                shown.append(f"[{name}]\n{text}")
        return "\n".join(shown)

    def summary_rows(self, extra: Mapping[str, Any]) -> dict[str, str]:
        """Held-out figures of the parts beside their baselines', for the user, by a label."""
        rows = {}
        for name, part in self.parts.items():
            unit = FIGURES[part.task.figure]
            beside = f"{BASELINES[part.beside]} {extra[f'{part.beside}_{name}']:.4f}"
            line = f"{extra[f'held_out_{name}']:.4f} {unit}, {beside}"
            if (accuracy := extra.get(f"held_out_router_{name}")) is not None:
                line += f"; router right at {100 * accuracy:.1f} % of the positions"
            rows[name] = line
        if (error := extra.get("held_out_pixel_error")) is not None:
            rows["pixels"] = (
                f"{error:.4f} {FIGURES['pixel_error']}, their mean {extra['pixel_error_of_mean']:.4f}"
            )
        return rows

    def _write_samples(self, model: ARBModel, folder: Path) -> None:
        """Spoken labels and drawn clips."""
        for part in self.parts.values():
            if isinstance(part, AudioPart | VideoPart):
                part.task.write_samples(model, folder)

    @torch.no_grad()
    def _router_accuracy(self, model: ARBModel, part: Part) -> float | None:
        """Share of held-out positions whose modality the router names; None without a router."""
        if model.router is None:
            return None
        shares, counts = [], []
        for batch in part.held_out_batches(ROUTER_ITEMS):
            part.output(model, *batch)
            shares.append(float(model.part_metrics()["router_accuracy"]))
            counts.append(len(batch[0]))
        return math.fsum(s * c for s, c in zip(shares, counts, strict=True)) / sum(counts)

    def _mean(self, values: Sequence[float]) -> float:
        return math.fsum(float(s) * v for s, v in zip(self._shares, values, strict=True))


SHOWN_BYTES = 60  # of a held-out text, and of what the model makes of it


def entropy(counts: np.ndarray) -> float:
    """Bits per value of values that are as frequent as `counts` says, each coded by its frequency alone."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0
