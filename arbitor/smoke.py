"""`arbitor smoke` (`python -m arbitor.smoke`): build a model, run it twice, and tell time and memory."""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console

from arbitor.config import ModelConfig, override
from arbitor.config import preset as preset_config
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.train.device import Device, backend, deterministic, peak_memory, resolve_device
from arbitor.train.report import print_rows

MB = 1e6
FAILED = 1

Result = TypeVar("Result")


def run(
    *,
    preset: str,
    state: str | None,
    seed: int,
    device: str,
    settings: dict[str, Any],
    batch: int,
    backward: bool,
    console: Console | None = None,
) -> int:
    """Build the preset, run two passes, print what they took.

    Args:
        preset: name of the preset.
        state: training state; None takes the preset's.
        seed: of weights, ids and rounding.
        device: auto, cpu or cuda.
        settings: fields of `ModelConfig` that replace the preset's.
        batch: windows.
        backward: whether a pass takes an optimizer step as well.
        console: where to print; None is stdout.

    Returns:
        Exit code: 0, or 1 if a loss was not finite or a step was dropped.
    """
    console = console or Console(highlight=False)
    if batch < 1:
        raise UserError(f"--batch is {batch}; it must be at least 1")
    config = override(preset_config(preset), **settings, **({"state": state} if state else {}))
    place = resolve_device(device)
    if place.is_cuda:
        torch.cuda.reset_peak_memory_stats(place.device)
    with deterministic(seed, place.device):
        model, build_seconds = _timed(place, lambda: ARBModel(config=config.model, device=place.device))
        optimizer = VoteOptimizer(model, state=config.train.state, seed=seed)
        report = audit(model, optimizer)
        rows = {
            "model": f"{preset}: {report.trit_weights / 1e6:,.2f} M trit weights{_parts(config.model)}",
            "device": f"{place.name}: {place.reason}",
            "back end": backend(place.device),
            "state": f"{config.train.state}: {report.total_bytes / MB:,.1f} MB "
            f"({report.bytes_per_weight:.3f} bytes a weight)",
            "build": f"{build_seconds:.3f} s, peak {peak_memory(place) / MB:,.1f} MB",
        }
        failed = False
        for number in ("first", "second"):
            ids = torch.randint(0, 256, (batch, config.model.ctx))
            losses, forward_seconds = _timed(place, partial(_forward, model, ids, backward))
            text = f"forward {forward_seconds:.4f} s"
            if backward:
                _, seconds = _timed(place, partial(_step, optimizer, losses))
                text += f", backward + update {seconds:.4f} s"
                failed |= not optimizer.last_step_applied
            failed |= not bool(torch.isfinite(losses))
            rows[f"{number} run"] = f"{text}, loss {float(losses.detach()):.4f}"
    rows["peak"] = f"{peak_memory(place) / MB:,.1f} MB" + ("" if place.is_cuda else " of the whole process")
    print_rows(console, rows)
    if failed:
        print("arbitor: error: a loss was not finite, or its step was dropped", file=sys.stderr)
    return FAILED if failed else 0


def _parts(config: ModelConfig) -> str:
    """The parts beyond the trunk, in words."""
    named = {
        f"{config.num_experts} experts, top {config.num_active_experts}": config.num_experts,
        f"at most {config.max_moe_iters} iterations": config.has_core,
        f"motifs of {config.motif_trits} trits": config.motif_trits,
        f"graph of {config.graph_edges:,} edges": config.graph_edges,
        "n-gram memory": config.memory_rows,
    }
    parts = [name for name, on in named.items() if on]
    return f" ({', '.join(parts)}; context {config.ctx})" if parts else f" (context {config.ctx})"


def _forward(model: ARBModel, ids: torch.Tensor, backward: bool) -> torch.Tensor:
    with torch.set_grad_enabled(backward):
        loss = model(ids, targets=ids).loss
    assert loss is not None
    return loss


def _step(optimizer: VoteOptimizer, loss: torch.Tensor) -> None:
    optimizer.note_loss(loss)
    loss.backward()
    optimizer.step()


def _timed(device: Device, work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns, and the seconds until the device had done it."""
    device.synchronize()
    started = time.perf_counter()
    result = work()
    device.synchronize()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    from arbitor.cli import main

    sys.exit(main(["smoke", *sys.argv[1:]]))
