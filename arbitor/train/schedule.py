"""Learning rate over a run: a linear warm-up, then half a cosine down to 0."""

import math


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: 0 for the first step.
        steps: of the whole run.
        peak: reached at the end of the warm-up.
        warmup: share of the steps in which the rate rises.

    Returns:
        Above 0 for every step of the run; 0 from `steps` on.
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
