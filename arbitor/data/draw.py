"""Media in random order, images each a little moved; everything follows from the seed and a counter.

Shapes: B images, C channels, S pixels a side.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from arbitor.data.images import CaptionedImages
from arbitor.data.sampler import random_bits
from arbitor.errors import UserError

MAX_SHIFT = 1 / 8  # of the side
MAX_TURN = 10.0  # degrees
_AUGMENT_KEY = 0x5EED


class EpochSampler:
    """Draws items in epochs, each in an order of its own; draw n is a function of (seed, n) and the items.

    Args:
        count: items that there are.
        batch: items a draw.
        seed: any non-negative integer below 2^63.
        noun: what they are, in words; also its key in the state.
        fingerprint: of the items.
    """

    def __init__(self, count: int, batch: int, seed: int, noun: str, fingerprint: int) -> None:
        self._count = count
        self._batch = batch
        self._seed = seed
        self._noun = noun
        self._fingerprint = fingerprint
        self._drawn = 0
        self._order: tuple[int, np.ndarray] | None = None

    def next_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the next items, int64 [B], and 64 random bits for each, uint64 [B]."""
        places = np.arange(self._drawn, self._drawn + self._batch)
        self._drawn += self._batch
        epochs, offsets = np.divmod(places, self._count)
        numbers = np.array([self._epoch(int(e))[o] for e, o in zip(epochs, offsets, strict=True)])
        return numbers, random_bits(self._seed ^ _AUGMENT_KEY, places.astype(np.uint64))

    def state(self) -> dict[str, int]:
        """Where the sampler stands, as plain integers."""
        values = (self._seed, self._drawn, self._count, self._fingerprint)
        return dict(zip(self._state_keys, values, strict=True))

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from `state`, exactly.

        Raises:
            UserError: if `state` is not a sampler's, or was taken on other data.
        """
        keys, noun = self._state_keys, self._noun
        if sorted(state) != sorted(keys):
            raise UserError(
                f"sampler state has the keys {sorted(state)}, needed are {sorted(keys)}: the run was "
                f"trained on other data than {noun} (start a new run)"
            )
        for key in keys:
            if type(state[key]) is not int or not 0 <= state[key] < 1 << 63:
                raise UserError(
                    f"sampler state: {key} must be a non-negative integer, got {state[key]!r:.80}"
                )
        if (state[noun], state["digest"]) != (self._count, self._fingerprint):
            raise UserError(
                f"the training {noun} are not what they were: {state[noun]:,} then, {self._count:,} now"
                + (", with other content" if state[noun] == self._count else "")
                + "; an exact resume needs the same data (start a new run to train on other data)"
            )
        self._seed = state["seed"]
        self._drawn = state["drawn"]
        self._order = None

    @property
    def _state_keys(self) -> tuple[str, ...]:
        return ("seed", "drawn", self._noun, "digest")

    def _epoch(self, epoch: int) -> np.ndarray:
        """Numbers of the items in the order of an epoch."""
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._order = (epoch, generator.permutation(self._count))
        return self._order[1]


class ImageSampler(EpochSampler):
    """Draws images.

    Args:
        images: what to draw from.
        batch: images a draw.
        seed: any non-negative integer below 2^63.
        augment: shift and turn every image at random (see `moved`).
    """

    def __init__(self, images: CaptionedImages, batch: int, seed: int = 0, *, augment: bool = True) -> None:
        super().__init__(len(images), batch, seed, "images", images.fingerprint())
        self._images = images
        self._augment = augment

    def next(self) -> tuple[np.ndarray, torch.Tensor]:
        """The next images: their numbers int64 [B], and their pixels uint8 [B, C, S, S]."""
        numbers, bits = self.next_numbers()
        pixels = torch.from_numpy(self._images.images(numbers))
        return numbers, moved(pixels, bits) if self._augment else pixels


def moved(pixels: torch.Tensor, bits_B: np.ndarray) -> torch.Tensor:
    """Images shifted by up to an eighth of their side and turned by up to 10 degrees, black at the edges.

    Args:
        pixels: uint8 [B, C, S, S] on the CPU.
        bits_B: uint64, 16 bits each for right, down and turn of an image.
    """
    fields = np.stack([(bits_B >> np.uint64(16 * n)) & np.uint64(0xFFFF) for n in range(3)])
    right_B, down_B, turn_B = torch.from_numpy(fields.astype(np.float32) / 32767.5 - 1)
    angle_B = turn_B * (MAX_TURN * torch.pi / 180)
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    # grid_sample counts from -1 to 1 over the side.
    rows = [cos_B, -sin_B, right_B * (2 * MAX_SHIFT), sin_B, cos_B, down_B * (2 * MAX_SHIFT)]
    theta_B23 = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta_B23, list(pixels.shape), align_corners=False)
    sampled = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)
