"""Real, drawn and coded clips of the measurement of the flow, and pictures of them.

Shape letters: B clips, F frames, C channels, S pixels a side.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arbitor.data.images import WORDS
from arbitor.data.sampler import random_bits
from arbitor.data.video import FRAMES_PER_SECOND, Clips, VideoCorpus, sheet, write_clips
from arbitor.drawing import autoencoder_of, draw
from arbitor.model import ARBModel

CODED_AT_A_TIME = 256
DRAWS = 3  # of each caption, in the picture that plays
STEP = 17  # between its levels, 0 to 255, so that the file stays small


def drawn(model: ARBModel, captions: Sequence[bytes], options: argparse.Namespace) -> Tensor:
    """Clips uint8 [B, F, C, S, S] drawn to captions."""
    parts = []
    for first in range(0, len(captions), CODED_AT_A_TIME):
        some = captions[first : first + CODED_AT_A_TIME]
        parts.append(
            draw(
                model,
                some,
                steps=options.sample_steps,
                sampler=options.sampler,
                guidance=options.guidance,
                seed=first,
            )
        )
    return torch.cat(parts)


def random_numbers(clips: Clips, count: int, seed: int) -> np.ndarray:
    """Which of the things the clips of `random_clips` are of, int64 [B]."""
    bits = random_bits(2 * seed, np.arange(count, dtype=np.uint64))
    return (bits % np.uint64(len(clips))).astype(np.int64)


def captions_of(clips: Clips, count: int, seed: int) -> list[bytes]:
    """The captions of the clips of `random_clips`."""
    return [clips.captions[number] for number in random_numbers(clips, count, seed)]


def random_clips(clips: Clips, count: int, seed: int) -> Tensor:
    """Clips uint8 [B, F, C, S, S] of things at random."""
    bits = random_bits(2 * seed + 1, np.arange(count, dtype=np.uint64))
    return torch.from_numpy(clips.clips(random_numbers(clips, count, seed), bits))


def coded(model: ARBModel, clips: Tensor) -> Tensor:
    """Standardised latents of many clips, on the model's device."""
    codec = autoencoder_of(model)
    return torch.cat([codec.encode(part) for part in _parts(clips, model.device)])


def decoded(model: ARBModel, latents: Tensor) -> Tensor:
    """Clips uint8 of many latents, on the CPU."""
    codec = autoencoder_of(model)
    return torch.cat([codec.decode(part).cpu() for part in _parts(latents, model.device)])


def _parts(tensor: Tensor, device: torch.device) -> Iterator[Tensor]:
    return (part.to(device) for part in tensor.split(CODED_AT_A_TIME))


def write_sheets(model: ARBModel, corpus: VideoCorpus, options: argparse.Namespace, stem: Path) -> None:
    """`<stem>.png`: a real clip of every caption above a drawn one; `<stem>.gif`: drawn ones, playing."""
    held_out = corpus.held_out
    captions = sorted(set(held_out.captions), key=lambda caption: WORDS.index(caption.decode()))
    numbers = np.array([held_out.captions.index(caption) for caption in captions])
    real = torch.from_numpy(held_out.clips(numbers, random_bits(8, np.arange(len(numbers), dtype=np.uint64))))
    made = drawn(model, captions * DRAWS, options)
    pairs = torch.stack([real, made[: len(captions)]], dim=1).flatten(0, 1).numpy()
    path = stem.with_suffix(".png")
    write_clips(path, pairs)
    words = ", ".join(caption.decode() for caption in captions)
    print(f"{path}: a clip a row, real ones above drawn ones: {words}")
    path = stem.with_suffix(".gif")
    play(path, made.unflatten(0, (DRAWS, len(captions))).numpy())
    print(f"{path}: drawn clips, {DRAWS} rows of {words}")


def play(path: Path, clips: np.ndarray) -> None:
    """Write clips uint8 [rows, columns, F, C, S, S] as a GIF that plays all at once, in few levels."""
    from PIL import Image

    frames = [Image.fromarray(sheet(clips[:, :, f] // STEP * STEP, zoom=3)) for f in range(clips.shape[2])]
    duration = 1000 // FRAMES_PER_SECOND
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
