"""Learning rate over a run: a linear warm-up, then half a cosine down to 0."""

import math

from arbitor.config import RunConfig
from arbitor.ternary.optimizer import SIGN_LR, STATES

STATES_STEPS = 480  # length of the runs that the states' own rates suit


def default_peak(config: RunConfig) -> float:
    """Peak learning rate, in trits per step, of a run that was given none.

    Votes are of one size whatever the gradient's, so what their noise moves grows with the rate and the
    root of the steps; a longer run of text wants less of it. How far that carries, and that nothing is known
    of other data, stands in docs/experiments.md, "the rate falls with the length of a run".
    """
    train = config.train
    if train.rule == "sign":
        return SIGN_LR  # of the tables
    rate = STATES[train.state].lr
    if train.steps <= STATES_STEPS or config.learns != ("text",):
        return rate
    return rate * math.sqrt(STATES_STEPS / train.steps)


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
