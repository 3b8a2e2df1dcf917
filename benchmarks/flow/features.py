"""Features of clips, and the Fréchet distance of two sets of them (Heusel et al. 2017, "GANs Trained by a Two
Time-Scale Update Rule").

The features are the last hidden layer of a small float network that was trained, on real clips alone, to name
the digit and the velocity at which it begins to move.

Shape letters: B clips, F frames, C channels, S pixels a side, Y features.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.data.images import WORDS
from arbitor.data.sampler import random_bits
from arbitor.data.video import MAX_SPEED, MovingDigits, velocities

FEATURES = 64
BATCH = 128
WAYS = 2 * MAX_SPEED + 1


class ClipClassifier(nn.Module):
    """Three convolutions over time, rows and columns, a hidden layer, and two linear classifiers.

    Args:
        frames, channels, size: F, C and S.
    """

    def __init__(self, frames: int, channels: int, size: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv3d(a, b, 3, stride=(2 if n else 1, 2, 2), padding=1)
            for n, (a, b) in enumerate(itertools.pairwise(widths))
        )
        left = math.ceil(frames / 4) * math.ceil(size / 8) ** 2
        self.hidden = nn.Linear(widths[-1] * left, FEATURES)
        self.names = nn.Linear(FEATURES, len(WORDS))
        self.ways = nn.Linear(FEATURES, WAYS**2)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips uint8 [B, F, C, S, S] -> features fp32 [B, Y]."""
        x = clips.transpose(1, 2).float() / 128 - 1
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.hidden(x.flatten(1)))


def train_classifier(digits: MovingDigits, steps: int, device: torch.device, seed: int = 0) -> ClipClassifier:
    """One that was trained for some steps of 128 clips."""
    shape = digits.geometry
    torch.manual_seed(seed)
    model = ClipClassifier(shape.frames, shape.channels, shape.size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        clips, name_B, way_B = labelled(digits, BATCH, step, seed)
        features = model(clips.to(device))
        loss = F.cross_entropy(model.names(features), name_B.to(device))
        loss = loss + F.cross_entropy(model.ways(features), way_B.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def shares_right(model: ClipClassifier, digits: MovingDigits, device: torch.device) -> tuple[float, float]:
    """The shares of 1,024 clips whose name, and whose velocity, is given right."""
    clips, name_B, way_B = labelled(digits, 1024, 0, 1 << 40)
    features = model(clips.to(device))
    pairs = ((model.names(features), name_B), (model.ways(features), way_B))
    name, way = (float((logits.argmax(dim=1).cpu() == right).float().mean()) for logits, right in pairs)
    return name, way


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
