"""Counts the kernels that training steps of many batches and contexts need, on a machine without a GPU.

    python -m testing.ops.launches

Triton is given a GPU that need not be there and every launch is left out; what is counted are the keys by
which Triton itself tells kernels apart. Prints one line of JSON for each case.
"""

import json
import os
from typing import TYPE_CHECKING, Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.runtime import driver, jit

from arbitor.ops import backend, precompile, thresholds
from testing.ops.compile_kernels import Target

if TYPE_CHECKING:
    from arbitor.config import RunConfig

SMALL = {"dim": 32, "expert_dim": 96, "ffn_dim": 32, "num_prelude_layers": 1, "num_coda_layers": 0}
PAIRS = [(1 + number % 5, 16 + 5 * number) for number in range(50)]


class Keys:
    """The kernels that were launched since the last look, by Triton's own keys, and those of `precompile`."""

    def __init__(self) -> None:
        self.triton: set[object] = set()
        self.own: set[object] = set()

    def run(self, kernel: Any, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        """Stands for `JITFunction.run`."""
        *_, binder = kernel.device_caches[0]
        _, specialization, rest = binder(*arguments, **options, debug=False)
        self.triton.add((kernel.fn, str(specialization), str(rest)))
        self.own.add(precompile.specialization(kernel, arguments, options))


def count(config: "RunConfig", shapes: list[tuple[int, int]], keys: Keys) -> None:
    """Training steps of these shapes."""
    from arbitor.model import ARBModel
    from arbitor.ternary import VoteOptimizer

    torch.manual_seed(0)
    model = ARBModel(config=config.model)
    optimizer = VoteOptimizer(model, state=config.train.state)
    with precompile._zeros():
        for batch, ctx in shapes:
            ids = torch.randint(0, 256, (batch, ctx))
            model(ids, targets=ids).loss.backward()
            optimizer.step()
    assert not optimizer.dropped_steps


def compare(config: "RunConfig", few_tokens: int) -> dict[str, int]:
    """How many kernels the shapes of a warm-up need, and how many more those of the 50 pairs."""
    from arbitor.smoke import step_shapes

    warm, later = Keys(), Keys()
    with thresholds.forced(few_tokens=few_tokens):
        for keys, shapes in ((warm, step_shapes(config.model.ctx)), (later, PAIRS)):
            jit.JITFunction.run = lambda *args, keys=keys, **rest: keys.run(*args, **rest)
            count(config, shapes, keys)
    return {
        "warm": len(warm.triton),
        "later": len(later.triton - warm.triton),
        "own_keys_differ": len(warm.own) - len(warm.triton),
    }


CASES = {
    "whole model with a memory, lean": ("arb-small", "lean", 64, {**SMALL, "memory_rows": 256}),
    "tiny, an exponent for every 32": ("tiny", "lean", 64, {"num_prelude_layers": 1, "tscale": "T32"}),
    "tiny, many few tokens": ("tiny", "full", 512, {"num_prelude_layers": 1}),
    "tiny, few few tokens": ("tiny", "compact", 16, {"num_prelude_layers": 1}),
}

if __name__ == "__main__":
    driver.set_active(Target())
    backend.uses_triton = lambda _: True  # ahead of the operations, which take it from there
    from arbitor.config import override, preset
    from arbitor.ops.expert_linear import reference

    # As large models have: slices of experts, as many as the number of tokens lets them be.
    reference.WORKSPACE_BYTES = 1 << 14
    for case, (name, state, few_tokens, sizes) in CASES.items():
        config = override(preset(name), state=state, **sizes)
        print(json.dumps({"case": case, **compare(config, few_tokens)}))
