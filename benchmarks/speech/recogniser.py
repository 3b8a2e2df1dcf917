"""A float recogniser of words, trained on real recordings, that reads spoken words back.

Shape letters: B recordings, N samples, F frames, M bands, W words.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.data.audio import Recordings
from arbitor.data.clips import clip, varied
from arbitor.data.draw import EpochSampler
from arbitor.sidecars.spectrum import log_mel

BANDS = 64
WIDTH = 128


class Recogniser(nn.Module):
    """Three convolutions over log-mel frames, then the mean over time; knows nothing of the codec.

    Args:
        words: what it tells apart.
        rate: samples a second.
        samples: of the clips that it reads.
    """

    def __init__(self, words: Sequence[bytes], rate: int, samples: int) -> None:
        super().__init__()
        self.words, self.rate, self.samples = list(words), rate, samples
        sizes = (BANDS, WIDTH, WIDTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.Conv1d(i, o, 5, stride=2, padding=2) for i, o in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in sizes[1:])
        self.out = nn.Linear(2 * WIDTH, len(words))

    def forward(self, waves_BN: Tensor) -> Tensor:
        """Logits [B, W]."""
        hop = self.rate // 100
        x = ((log_mel(waves_BN, self.rate, 4 * hop, hop, BANDS) + 5) / 3).transpose(1, 2)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        pooled = torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)
        return self.out(F.dropout(pooled, 0.3, self.training))

    @torch.no_grad()
    def read(self, waves: Sequence[np.ndarray]) -> list[bytes]:
        """The likeliest word of each sound."""
        self.eval()
        device = self.out.weight.device
        clips = torch.from_numpy(np.stack([clip(wave, self.samples) for wave in waves]))
        return [self.words[i] for i in self(clips.to(device)).argmax(dim=1).tolist()]


def train_recogniser(
    recordings: Recordings, samples: int, steps: int, device: torch.device, seed: int = 0
) -> Recogniser:
    """A recogniser of the recordings' labels, trained with AdamW on varied clips of 64 at a time."""
    torch.manual_seed(seed)
    words = sorted(set(recordings.labels))
    model = Recogniser(words, recordings.rate, samples).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    sampler = EpochSampler(len(recordings), 64, seed, "recordings", 0)
    for _ in range(steps):
        numbers, bits_B = sampler.next_numbers()
        clips = [
            clip(varied(recordings.wave(n), bits & (1 << 48) - 1), samples, bits >> 48)
            for n, bits in zip(numbers.tolist(), bits_B.tolist(), strict=True)
        ]
        target = torch.tensor([words.index(recordings.labels[n]) for n in numbers], device=device)
        loss = F.cross_entropy(model(torch.from_numpy(np.stack(clips)).to(device)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def share_right(recogniser: Recogniser, waves: Sequence[np.ndarray], words: Sequence[bytes]) -> float:
    """The share of sounds whose word is read right."""
    read = [w for first in range(0, len(waves), 64) for w in recogniser.read(waves[first : first + 64])]
    return sum(a == b for a, b in zip(read, words, strict=True)) / len(words)
