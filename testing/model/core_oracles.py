"""The core in float64, a position at a time, with dense weights that autograd differentiates.

Written from the definitions and not from the model's code. Every function takes one row [D].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.ternary import TernaryExperts, TernaryLinear


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-6)


def linear(weight: Tensor, x: Tensor) -> Tensor:
    """A ternary linear without activation rounding."""
    return weight @ rms(x)


def dense_weights(module: nn.Module) -> dict[str, Tensor]:
    """Float64 leaves of all ternary matrices, by the names of their modules."""
    return {
        name: part.decode(torch.float64).requires_grad_()
        for name, part in module.named_modules()
        if isinstance(part, TernaryLinear | TernaryExperts)
    }


def feed_forward(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    return linear(down, F.relu(linear(up, x)) ** 2)


def chosen_experts(affinity: Tensor, bias: list[int], num_active: int) -> list[int]:
    """The experts of largest affinity + bias / 1024; among equals the lowest numbers."""
    scores = [float(torch.tensor(float(a)) + b / 1024) for a, b in zip(affinity.detach(), bias, strict=True)]
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:num_active]


def moe(weights: dict[str, Tensor], bias: list[int], num_active: int, s: Tensor) -> Tensor:
    """The mixture of experts, with weights named as in `MoE`."""
    affinity = torch.sigmoid(linear(weights["router.affinity"], s))
    chosen = chosen_experts(affinity, bias, num_active)
    total = sum(affinity[e] for e in chosen)
    result = feed_forward(weights["shared.up"], weights["shared.down"], s)
    for e in chosen:
        result = result + affinity[e] / total * feed_forward(weights["up"][e], weights["down"][e], s)
    return result


def halt(update, p_of, decay: Tensor, h: Tensor, max_iters: int, threshold: float):
    """Adaptive computation time of one position.

    Args:
        update: state -> state, one iteration without the injection.
        p_of: state -> halting probability.
        decay: a [D].

    Returns:
        Result, iterations, remainder.
    """
    s, states, probabilities = h, [], []
    for n in range(1, max_iters + 1):
        s = update(decay * s + (1 - decay) * h)
        states.append(s)
        p = p_of(s)
        if n == max_iters or float(sum(probabilities, p).detach()) >= threshold:
            break
        probabilities.append(p)
    remainder = 1 - sum(probabilities) if probabilities else torch.ones((), dtype=h.dtype)
    result = remainder * states[-1]
    for p, state in zip(probabilities, states[:-1], strict=True):
        result = result + p * state
    return result, len(states), remainder
