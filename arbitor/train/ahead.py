"""Compiles the kernels of training steps on a GPU ahead of the first one: of any batch, or of one run's.

What is launched depends on how many positions a batch has: there are kernels for few and for many, with tiles
of several sizes. So steps are taken, with launches left out, of one batch between each two numbers of
positions at which something else is launched, as the thresholds in force and the kernels' own choices say.
"""

import functools
import gc
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from arbitor import __version__
from arbitor.config import RunConfig
from arbitor.model import ARBModel
from arbitor.ops import compilers, thresholds
from arbitor.ops.precompile import Compiled, compiled_ahead
from arbitor.ternary import TernaryExperts, VoteOptimizer
from arbitor.ternary.step import MOST_FACTORED_TOKENS
from arbitor.ternary.tensor import TernaryScaleTensor
from arbitor.train.device import Device, deterministic, uses_kernels

WINDOW = 2  # bytes of a window that have no position
SHORTEST = 4  # bytes of a window with one that counts
MANY_ROWS = 4096  # rows of a matrix that is neither small nor large
MOST_ROWS = 1 << 22  # of a batch, for which a tile may be chosen
MICRO_BATCHES = 2  # from the second one on, gradients add up
BEYOND = 9, 8  # the ratio to the last change that what comes after it is tried at


def compile_steps(config: RunConfig, device: Device, threads: int | None = None) -> Compiled:
    """Compile what training steps of `config` launch on a GPU, whatever their batch and context.

    The steps are of a model of its own, which is thrown away; random numbers and settings are afterwards what
    they were.

    Args:
        config: of the run.
        device: a GPU.
        threads: that compile; None takes the processes of `fork_compilers`, else a thread for each core.
    """
    return _compile(config, device, threads, lambda changes: step_shapes(config.model.ctx, changes), 1)


def compile_for_run(config: RunConfig, device: Device, note: Callable[[str], None]) -> None:
    """Compile what the steps of this very run launch, and end the processes of `fork_compilers`.

    Costs a look at a file where that was done before, on this GPU with these kernels; the file lies in
    Triton's cache, so that it goes where that goes. Where it is wrong, kernels are compiled when they are
    launched. So are those of audio, of video, of the parts for images, and of samples.

    Args:
        config: of the run.
        device: where it runs; anything but a GPU with kernels needs nothing.
        note: is given a line about what was compiled, if something was.
    """
    try:
        if device.is_cuda and uses_kernels() and not (config.data.audio_task or config.data.video_task):
            _compile_once(config, device, note)
    except torch.cuda.OutOfMemoryError:
        pass  # which training will say as well, if there is no room for it
    finally:
        compilers.end_compilers()


def _compile_once(config: RunConfig, device: Device, note: Callable[[str], None]) -> None:
    from arbitor.ops.triton import cache_folder

    mark = cache_folder() / "arbitor" / _name(config, device)
    if mark.exists() or config.model.memory_host:  # of which there shall not be two at once
        return

    def own_shape(changes: list[int]) -> list[tuple[int, int]]:
        train, ctx = config.train, config.model.ctx
        if train.batch * (ctx - WINDOW) <= _beyond(changes):
            return [(train.batch, ctx)]
        return step_shapes(ctx, changes)[:1]

    compiled = _compile(config, device, None, own_shape, min(config.train.accum, MICRO_BATCHES))
    _write(mark)
    if compiled.new:
        note(f"compiled {compiled.new} kernels with {workers(compiled)} in {compiled.seconds:.1f} s")


def workers(compiled: Compiled) -> str:
    """Who compiled, in words."""
    kind = ("process", "es") if compiled.processes else ("thread", "s")
    count = compiled.processes or compiled.threads
    return f"{count} {kind[0]}{kind[1] if count > 1 else ''}"


def step_shapes(ctx: int, changes: list[int]) -> list[tuple[int, int]]:
    """Batches and contexts of steps that launch, together, what any batch launches.

    Args:
        ctx: the longest context, in bytes.
        changes: ascending, numbers of positions up to which the same is launched; see `changes_of`.

    Returns:
        One with as many positions as lie between each two of them; ahead of these one beyond the last, since
        most kernels are for many positions; and the shortest, in which all gradients stay factors.
    """
    middles = [(low + high + 1) // 2 for low, high in itertools.pairwise([0, *changes])]
    shapes = []
    for positions in [_beyond(changes), *middles]:
        batch = -(-positions // (ctx - WINDOW))
        length = max(SHORTEST, positions // batch + WINDOW)
        shapes.append((batch, length))
    return list(dict.fromkeys([*shapes, (1, SHORTEST)]))


def changes_of(model: ARBModel, device: torch.device) -> list[int]:
    """Numbers of positions in a step beyond which it launches other kernels than up to there, ascending.

    Args:
        model: whose steps they are.
        device: whose thresholds hold.
    """
    return sorted({positions for positions in _changes(model, device) if positions > 0})


def _changes(model: ARBModel, device: torch.device) -> Iterator[int]:
    from arbitor.ops.expert_linear import triton as expert_linear
    from arbitor.ops.int8_matmul import triton as int8_matmul
    from arbitor.ops.ternary_linear import triton as ternary_linear

    config = model.config
    few = thresholds.threshold("few_tokens", device)
    yield few
    widths = sorted({ternary_linear.PAIRED_TOKENS, *(tile.tokens for tile in ternary_linear.TILES)})
    yield from (width for width in widths[:-1] if width < few)  # the widest has all the others
    iterations = config.max_moe_iters if model.core is not None else 1
    # How much of a gradient stays in factors, until the product takes less memory.
    most = max(
        (_dense_from(name, module, config, iterations) for name, module in _matrices(model)), default=1
    )
    yield most
    yield from _turns(lambda tokens: int8_matmul._tile(tokens, MANY_ROWS, True))
    if model.core is None:
        return
    uses = [(1, 1)]  # of a matrix on the first rows only
    if config.num_experts:
        uses.append((config.num_experts, config.num_active_experts))
        yield MOST_FACTORED_TOKENS // (config.num_active_experts * iterations)
    for experts, each in uses:
        for few in (expert_linear.FEW_ROWS_EACH, thresholds.threshold("few_expert_rows", device)):
            yield expert_linear.few_rows(experts, few) // each
        turns = _turns(functools.partial(_expert_tile, experts))
        yield from (rows // each for rows in turns)


def _expert_tile(experts: int, rows: int) -> object:
    from arbitor.ops.expert_linear import triton as expert_linear

    return expert_linear._many_tile(rows, experts, MANY_ROWS)


def _turns(choice: Callable[[int], object]) -> Iterator[int]:
    """Sizes for which something else is chosen than for the next one."""
    low, before = 1, choice(1)
    while low < MOST_ROWS:
        high = 2 * low
        while choice(high) != before and high - low > 1:  # the last size with the former choice lies below
            middle = (low + high) // 2
            if choice(middle) == before:
                low = middle
            else:
                high = middle
        if choice(high) != before:
            yield low
            before = choice(high)
        low = high


def _matrices(model: ARBModel) -> Iterator[tuple[str, TernaryScaleTensor]]:
    for name, module in model.named_modules():
        if isinstance(module, TernaryScaleTensor):
            yield name, module


def _dense_from(name: str, module: TernaryScaleTensor, config: Any, iterations: int) -> int:
    """Positions from which on the factors of a gradient take as much memory as it does, in bf16."""
    uses, rows = 1, module.numel() // module.in_features
    if name.startswith("core."):
        uses *= iterations
    if isinstance(module, TernaryExperts):
        uses *= config.num_active_experts
    taken = module.in_features + 2 * module.out_features  # by the codes and the output gradient of a use
    return -(-2 * rows * module.in_features // (taken * uses))


def _beyond(changes: list[int]) -> int:
    more, of = BEYOND
    return -(-max(changes) * more // of) + 1


def _compile(
    config: RunConfig,
    device: Device,
    threads: int | None,
    shapes: Callable[[list[int]], list[tuple[int, int]]],
    micro_batches: int,
) -> Compiled:
    train = config.train
    with deterministic(train.seed, device.device), compiled_ahead(device.device, threads) as report:
        model = ARBModel(config=config.model, device=device.device)
        optimizer = VoteOptimizer(
            model,
            rule=train.rule,
            state=train.state,
            accum_threshold=train.accum_threshold,
            e_accum_threshold=train.e_accum_threshold,
            scale_lr=train.scale_lr,
        )
        for batch, ctx in shapes(changes_of(model, device.device)):
            try:
                for _ in range(micro_batches):
                    ids_BL = torch.randint(0, 256, (batch, ctx))
                    loss = model(ids_BL, targets=ids_BL).loss
                    assert loss is not None
                    optimizer.note_loss(loss)
                    loss.backward()
                optimizer.step()
            except torch.cuda.OutOfMemoryError:  # nor will there be room for training on so many bytes
                optimizer.zero_grad()
        optimizer.detach()
        del model, optimizer
    gc.collect()
    if device.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device.device)
    return report


def _name(config: RunConfig, device: Device) -> str:
    """Changes with everything that the kernels of a run may depend on."""
    train = config.train
    parts = (
        __version__,
        thresholds.identity(device.device),
        sorted(thresholds.table(device.device).values.items()),
        config.model,
        (train.batch, min(train.accum, MICRO_BATCHES), train.rule, train.state, train.scale_lr > 0),
        (train.accum_threshold, train.e_accum_threshold),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _write(mark: Path) -> None:
    """An empty file; where it cannot be written, the next run does what this one did."""
    try:
        mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        pass
