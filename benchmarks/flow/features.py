"""Features of clips, and the Fréchet distance of two sets of them (Heusel et al. 2017, "GANs Trained by a Two
Time-Scale Update Rule").

The features are the last hidden layer of a small float network that was trained, on real clips alone, to name
the digit and the velocity at which it begins to move. They say something about digits only if it can name
them: `train_classifier` refuses one that names fewer than `LEAST_NAMED` of the real held-out clips.

Shape letters: B clips, F frames, C channels, S pixels a side, Y features.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.data.images import WORDS
from arbitor.data.sampler import random_bits
from arbitor.data.video import MAX_SPEED, MovingDigits, VideoCorpus, velocities
from arbitor.errors import UserError

FEATURES = 64
BATCH = 64
WAYS = 2 * MAX_SPEED + 1
CLASSIFIER = "pooled"  # the column of that name; other architectures have other features
LEAST_NAMED = 0.95  # of real held-out clips
CHECKED = 2048  # clips that the shares are of
PEAK_LR, WARM_UP = 1e-2, 0.2


class ClipClassifier(nn.Module):
    """What is in a clip wherever it is, and how it moves; a hidden layer, and two linear classifiers.

    The digit is looked for in each frame by convolutions that are pooled over places (largest) and frames
    (mean); its motion by convolutions over time, rows and columns that keep places apart.

    Args:
        frames, channels, size: F, C and S.
    """

    def __init__(self, frames: int, channels: int, size: int) -> None:
        super().__init__()
        looks, moves = (channels, 16, 32, 64), (channels, 8, 16, 32)
        self.look = nn.Sequential()
        for n, (a, b) in enumerate(itertools.pairwise(looks)):
            self.look.extend([nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()])
            if n < len(looks) - 2:
                self.look.append(nn.MaxPool2d(2))
        self.move = nn.Sequential()
        for n, (a, b) in enumerate(itertools.pairwise(moves)):
            stride = (2 if n else 1, 2, 2)
            self.move.extend([nn.Conv3d(a, b, 3, stride, padding=1), nn.BatchNorm3d(b), nn.ReLU()])
        left = math.ceil(frames / 4) * math.ceil(size / 8) ** 2
        self.hidden = nn.Linear(looks[-1] + moves[-1] * left, FEATURES)
        self.names = nn.Linear(FEATURES, len(WORDS))
        self.ways = nn.Linear(FEATURES, WAYS**2)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips uint8 [B, F, C, S, S] -> features fp32 [B, Y]."""
        B, F_ = clips.shape[:2]
        x = clips.float() / 128 - 1
        seen = self.look(x.flatten(0, 1)).amax(dim=(2, 3)).view(B, F_, -1).mean(dim=1)
        moved = self.move(x.transpose(1, 2)).flatten(1)
        return F.relu(self.hidden(torch.cat([seen, moved], dim=1)))


@dataclass(frozen=True, slots=True)
class Checked:
    """A classifier, and what it is worth on real held-out clips.

    Attributes:
        model: in evaluation mode.
        names, velocities: shares of the clips whose digit, and whose velocity, it gives right.
    """

    model: ClipClassifier
    names: float
    velocities: float


def train_classifier(corpus: VideoCorpus, steps: int, device: torch.device, seed: int = 0) -> Checked:
    """One that was trained for some steps of 64 training clips.

    Raises:
        UserError: it names fewer than `LEAST_NAMED` of the real held-out clips; or clips of something else.
    """
    digits, held_out = corpus.train, corpus.held_out
    if not isinstance(digits, MovingDigits) or not isinstance(held_out, MovingDigits):
        raise UserError("the classifier names moving digits, no other clips")
    shape = digits.geometry
    torch.manual_seed(seed)
    model = ClipClassifier(shape.frames, shape.channels, shape.size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, steps + 1, pct_start=WARM_UP)
    for step in range(steps):
        clips, name_B, way_B = labelled(digits, BATCH, step, seed)
        features = model(clips.to(device))
        loss = F.cross_entropy(model.names(features), name_B.to(device))
        loss = loss + F.cross_entropy(model.ways(features), way_B.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    names, velocities = shares_right(model, held_out, device)
    if names < LEAST_NAMED:
        raise UserError(
            f"the classifier names {100 * names:.1f} % of the real held-out clips after {steps} steps, and "
            f"its features say too little below {100 * LEAST_NAMED:g} %; give more --classifier-steps"
        )
    return Checked(model, names, velocities)


@torch.no_grad()
def shares_right(model: ClipClassifier, digits: MovingDigits, device: torch.device) -> tuple[float, float]:
    """The shares of `CHECKED` real clips whose name, and whose velocity, is given right."""
    clips, name_B, way_B = labelled(digits, CHECKED, 0, 1 << 40)
    features_BY = features_of(model, clips, device)
    pairs = ((model.names(features_BY), name_B), (model.ways(features_BY), way_B))
    name, way = (float((logits.argmax(dim=1).cpu() == right).float().mean()) for logits, right in pairs)
    return name, way


@torch.no_grad()
def features_of(model: ClipClassifier, clips: Tensor, device: torch.device, at_a_time: int = 256) -> Tensor:
    """Features fp32 [B, Y] of clips uint8 [B, F, C, S, S], on `device`."""
    return torch.cat([model(part.to(device)) for part in clips.split(at_a_time)])


@torch.no_grad()
def named_right(model: ClipClassifier, features_BY: Tensor, captions: Sequence[bytes]) -> float:
    """The share of clips, of which these are features, that are given the name in their caption."""
    wanted = torch.tensor([WORDS.index(caption.decode()) for caption in captions])
    return float((model.names(features_BY).argmax(dim=1).cpu() == wanted).float().mean())


def labelled(digits: MovingDigits, count: int, draw: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clips uint8 [B, F, C, S, S] of random digits, their names and velocities as classes int64 [B]."""
    places = np.arange(draw * count, (draw + 1) * count, dtype=np.uint64)
    numbers = (random_bits(seed + 1, places) % np.uint64(len(digits))).astype(np.int64)
    bits = random_bits(seed + 2, places)
    rows, columns = velocities(bits)
    names = [WORDS.index(digits.captions[n].decode()) for n in numbers]
    ways = (rows + MAX_SPEED) * WAYS + columns + MAX_SPEED
    return torch.from_numpy(digits.clips(numbers, bits)), torch.tensor(names), torch.from_numpy(ways)


def frechet_distance(one_BY: Tensor, other_BY: Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets of features."""
    means, covariances = [], []
    for features in (one_BY.double().cpu(), other_BY.double().cpu()):
        means.append(features.mean(dim=0))
        covariances.append(torch.cov(features.mT))
    root = _root(covariances[0])
    mixed = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((means[0] - means[1]).square().sum() + traces - 2 * mixed)


def _root(matrix: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(matrix)
    return (axes * values.clamp_min(0).sqrt()) @ axes.mT
