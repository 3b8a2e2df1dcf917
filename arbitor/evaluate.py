"""Bits per byte of a model on data: what an ideal compressor driven by the model would need for a byte.

The data is preceded by three PAD, so that its first three bytes are predicted as well, and cut into fixed
windows of the context length that overlap by half (by three bytes, with a context of 4). Every byte is
predicted exactly once: all of the first window, then the part of each window that lies beyond the one before
it. So most bytes have at least half a context before them, and the figure depends on nothing but model, data
and context.

Shape letters: B windows at a time, C ctx.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.errors import UserError
from arbitor.generate import greedy_texts
from arbitor.model.arb import ARBModel
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import PAD

MIN_CTX = WINDOW + 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Outcome of `bits_per_byte`.

    Attributes:
        bits_per_byte: -sum of log2 of the probability of every byte, divided by their number; of a task with
            another `figure`, that, of which less is better too.
        num_bytes: bytes predicted.
        windows: windows (or media with a caption) that it took.
        captions_right: of media, the share whose caption was written right; None for text.
        extra: other figures by name, which go into the logs.
    """

    bits_per_byte: float
    num_bytes: int
    windows: int
    captions_right: float | None = None
    extra: dict[str, float] = field(default_factory=dict)


def bits_per_byte(
    model: ARBModel,
    data: np.ndarray[Any, np.dtype[np.uint8]],
    ctx: int,
    *,
    max_windows: int | None = None,
    max_bytes: int | None = 1_000_000,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures a model on data; changes nothing in the model, and no random number is drawn.

    Args:
        model: any ARBModel.
        data: uint8 [num_bytes], an array or a memory map; only what is predicted is read.
        ctx: length of a window, at least 4.
        max_windows: use so many windows only, spread evenly over the data; None is no limit.
        max_bytes: use the first bytes only; None is no limit.
        batch: windows at a time, by default 16, or 2048 bytes of them if that is more; has no influence on
            the result beyond the last bits of a float.
        progress: called now and then with the windows that are done and those in all.

    Raises:
        UserError: no data, data of another type, or a number outside its range.
    """
    batch = max(16, 2048 // max(ctx, 1)) if batch is None else batch
    _check(data, ctx, max_windows, max_bytes, batch)
    if max_bytes is not None:
        data = data[:max_bytes]
    stride = _stride(ctx)
    length = WINDOW + len(data)
    num_windows = 1 + max(0, math.ceil((length - ctx) / stride))
    count = num_windows if max_windows is None else min(max_windows, num_windows)
    starts = [k * num_windows // count * stride for k in range(count)]
    window_nats: list[float] = []
    for first in range(0, count, batch):
        some = starts[first : first + batch]
        window_nats += _nats(model, np.stack([_window(data, start, ctx) for start in some]), some, length)
        if progress is not None:
            progress(len(window_nats), count)
    predicted = (_predicted(start, ctx, length) for start in starts)
    num_bytes = sum(end - begin for begin, end in predicted)
    return Evaluation(math.fsum(window_nats) / math.log(2) / num_bytes, num_bytes, count)


@torch.no_grad()
def caption_figures(
    model: ARBModel,
    medium: str,
    batches: Iterable[tuple[Tensor, Sequence[bytes], Tensor, Tensor]],
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Bits per byte of captions behind their media, and how many of them the model writes itself.

    A caption is right if the likeliest byte after another, up to EOS or STOP, gives all of it and no more.

    Args:
        model: one with a sidecar for the medium.
        medium: the sidecar's name.
        batches: media, captions, their ids int64 [B, L] and which of those count, bool [B, L].
        count: media in all, at least 1.
        progress: called with the media that are done and those in all.
    """
    nats: list[float] = []
    num_ids = right = done = 0
    for media, captions, ids_BL, mask_BL in batches:
        prefix = model.encode(medium, media)
        logits_BNS = model(ids_BL, prefix=prefix).logits[:, :-1]
        targets_BN = ids_BL[:, WINDOW:].to(logits_BNS.device)
        nats_BN = F.cross_entropy(logits_BNS.transpose(1, 2), targets_BN, reduction="none").cpu()
        counted = nats_BN[mask_BL[:, WINDOW:]]
        nats.append(float(counted.double().sum()))
        num_ids += len(counted)
        texts = greedy_texts(model, prefix, max(map(len, captions)) + 1)
        right += sum(text == caption for text, caption in zip(texts, captions, strict=True))
        done += len(captions)
        if progress is not None:
            progress(done, count)
    return Evaluation(math.fsum(nats) / math.log(2) / num_ids, num_ids, done, right / done)


def _stride(ctx: int) -> int:
    """Bytes from one window to the next; a window predicts ctx - 3."""
    return min(ctx // 2, ctx - WINDOW)


def _window(data: np.ndarray[Any, np.dtype[np.uint8]], start: int, ctx: int) -> np.ndarray[Any, Any]:
    """int64 [ctx]: part of the stream of three PAD and the data, filled up with PAD after its end."""
    window = np.full(ctx, PAD, dtype=np.int64)
    skipped = max(0, WINDOW - start)
    piece = data[max(0, start - WINDOW) : start - WINDOW + ctx]
    window[skipped : skipped + len(piece)] = piece
    return window


def _predicted(start: int, ctx: int, length: int) -> tuple[int, int]:
    """Rows of a window's logits that count, first and end; row i predicts position start + 3 + i."""
    begin = 0 if start == 0 else ctx - _stride(ctx) - WINDOW
    return begin, min(ctx, length - start) - WINDOW


def _nats(model: ARBModel, windows_BC: np.ndarray[Any, Any], starts: list[int], length: int) -> list[float]:
    """-log p, summed over the bytes of each window that no earlier window predicted."""
    ctx = windows_BC.shape[1]
    ids_BC = torch.from_numpy(windows_BC).to(model.device)
    with torch.no_grad():
        logits_BNS = model(ids_BC).logits[:, :-1]
    nats_BN = F.cross_entropy(logits_BNS.transpose(1, 2), ids_BC[:, WINDOW:], reduction="none").cpu()
    sums = []
    for nats_N, start in zip(nats_BN, starts, strict=True):
        begin, end = _predicted(start, ctx, length)
        sums.append(float(nats_N[begin:end].double().sum()))
    return sums


def _check(data: Any, ctx: int, max_windows: int | None, max_bytes: int | None, batch: int) -> None:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
        given = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"data must be a uint8 array of one dimension, got {given}; np.frombuffer makes one")
    if len(data) == 0:
        raise UserError("the data holds no bytes; at least 1 is needed to measure bits per byte")
    if ctx < MIN_CTX:
        raise UserError(f"ctx is {ctx}; a window needs at least {MIN_CTX} bytes")
    for name, value in (("max_windows", max_windows), ("max_bytes", max_bytes), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
