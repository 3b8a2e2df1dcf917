"""Counts the kernels that training steps of many batches and contexts need, on a machine without a GPU.

    python -m testing.ops.launches

Triton is given a GPU that need not be there and every launch is left out; what is counted are the keys by
which Triton itself tells kernels apart. What the model does otherwise on a GPU than on a CPU, it does here as
on a GPU, and products of torch are left out. Prints one line of JSON for each case.
"""

import json
import os
from typing import TYPE_CHECKING, Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver, jit

from arbitor.ops import backend, precompile, thresholds
from testing.ops.compile_kernels import Target

if TYPE_CHECKING:
    from arbitor.config import RunConfig

SMALL = {"dim": 32, "expert_dim": 96, "ffn_dim": 32, "num_prelude_layers": 1, "num_coda_layers": 0}
PAIRS = [(1 + number % 5, 16 + 7 * number) for number in range(50)]


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


class NoProducts(TorchDispatchMode):
    """Inside, torch's products are zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if name in ("mm", "bmm"):
            a, b = args[:2]
            return a.new_zeros((*a.shape[:-1], b.shape[-1]), dtype=kwargs.get("out_dtype"))
        if name in ("addmm", "baddbmm"):
            _, a, b = args[:3]
            return a.new_zeros((*a.shape[:-1], b.shape[-1]))
        if name == "_grouped_mm":
            a, b, offsets = args[:3]
            groups = () if a.dim() != b.dim() else (len(offsets),)
            return a.new_zeros((*groups, a.shape[0], b.shape[-1]))
        return func(*args, **kwargs)


def as_on_a_gpu() -> None:
    """Choices that are made by the device of a tensor, as on a Hopper GPU."""
    from arbitor.model import ARBModel
    from arbitor.model.core import MoEGraph
    from arbitor.ops import activations, newton_schulz
    from arbitor.ops.activations import reference
    from arbitor.ops.int8_matmul import triton as int8_matmul
    from arbitor.ternary import update

    def may_persist(codes: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> bool:
        aligned = not (codes.shape[-1] % 16 or codes.data_ptr() % 16 or weight.data_ptr() % 16)
        return aligned and y.element_size() == 2

    for module in (activations, reference):
        module.weight_dtype = lambda x, quantized: torch.bfloat16 if quantized else x.dtype
        module.backward_dtype = lambda x: torch.bfloat16
    int8_matmul._can_persist = may_persist
    newton_schulz.iterates_narrow = update.iterates_narrow = lambda _: True
    ARBModel._autocast = lambda self: torch.autocast("cpu", torch.bfloat16)
    MoEGraph._masks = lambda self, h_MD: True


def count(config: "RunConfig", shapes: list[tuple[int, int]], keys: Keys) -> None:
    """Training steps of these shapes."""
    from arbitor.model import ARBModel
    from arbitor.ternary import VoteOptimizer

    torch.manual_seed(0)
    model = ARBModel(config=config.model)
    optimizer = VoteOptimizer(model, state=config.train.state)
    with precompile._zeros(), NoProducts():
        for batch, ctx in shapes:
            ids = torch.randint(0, 256, (batch, ctx))
            model(ids, targets=ids).loss.backward()
            optimizer.step()
    assert not optimizer.dropped_steps


def compare(config: "RunConfig", few_tokens: int) -> dict[str, int]:
    """How many kernels the shapes of a warm-up need, and how many more those of the 50 pairs."""
    from arbitor.model import ARBModel
    from arbitor.train.ahead import changes_of, step_shapes

    warm, later = Keys(), Keys()
    with thresholds.forced(few_tokens=few_tokens):
        changes = changes_of(ARBModel(config=config.model), torch.device("cpu"))
        for keys, shapes in ((warm, step_shapes(config.model.ctx, changes)), (later, PAIRS)):
            jit.JITFunction.run = lambda *args, keys=keys, **rest: keys.run(*args, **rest)
            count(config, shapes, keys)
    return {
        "warm": len(warm.triton),
        "later": len(later.triton - warm.triton),
        "own_keys_differ": len(warm.own) - len(warm.triton),
    }


WHOLE = ("arb-small", "lean", {**SMALL, "memory_rows": 256})
TINY = {"num_prelude_layers": 1}
# Of each the preset, its state and sizes; and the threshold.
CASES = {
    "whole model with a memory, no few tokens": (*WHOLE, 0),
    "whole model with a memory, the defaults": (*WHOLE, 8),
    "whole model with a memory, some few tokens": (*WHOLE, 64),
    "tiny, an exponent for every 32": ("tiny", "lean", {**TINY, "tscale": "T32"}, 8),
    "tiny, no few tokens": ("tiny", "full", TINY, 0),
    "tiny, the defaults": ("tiny", "compact", TINY, 8),
    "tiny, many few tokens": ("tiny", "full", TINY, 512),
}

if __name__ == "__main__":
    driver.set_active(Target())
    backend.uses_triton = lambda _: True  # ahead of the operations, which take it from there
    as_on_a_gpu()
    from arbitor.config import override, preset
    from arbitor.ops.expert_linear import reference

    # As large models have: slices of experts, as many as the number of tokens lets them be.
    reference.WORKSPACE_BYTES = 1 << 14
    for case, (name, state, sizes, few_tokens) in CASES.items():
        config = override(preset(name), state=state, **sizes)
        print(json.dumps({"case": case, **compare(config, few_tokens)}))
