"""What a trained flow is measured against, beside a Gaussian of the training latents: clips out of order.

Shape letters: B clips, F frames.
"""

import numpy as np
import torch
from torch import Tensor


def shuffled(clips: Tensor, seed: int) -> Tensor:
    """Clips [B, F, ...], the frames of each in a random order other than its own."""
    random = np.random.Generator(np.random.Philox(key=seed))
    orders = []
    for _ in range(len(clips)):
        order = random.permutation(clips.shape[1])
        while clips.shape[1] > 1 and (order == np.arange(clips.shape[1])).all():
            order = random.permutation(clips.shape[1])
        orders.append(order)
    index = torch.from_numpy(np.stack(orders)).to(clips.device)
    return clips[torch.arange(len(clips), device=clips.device)[:, None], index]
