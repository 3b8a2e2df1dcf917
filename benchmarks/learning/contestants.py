"""Who takes part: trits with each training state, and BitNet b1.58 and dense floats under AdamW and Muon."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from arbitor.config import ModelConfig
from arbitor.model import ARBModel
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.optimizer import STATES, StateKind
from arbitor.ternary.tensor import TernaryScaleTensor
from benchmarks.learning.twins import BitLinear, DenseLinear, FloatTable, make_twin

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
# Under Muon the two tables are trained by AdamW with this share of Muon's rate, so that one sweep moves both.
TABLE_LR_SHARE = 0.16


@dataclass(frozen=True)
class Contestant:
    """One way to train the model.

    Attributes:
        name: as in the results.
        lrs: where the sweep starts, neighbours a factor 2 apart; empty if there is no rate to tune.
        vote: arguments of `VoteOptimizer`, or None for a float twin.
        linear: the twin's linear layer, or None for trits.
        muon: whether the twin's matrices are trained by Muon, else by AdamW.
        seeds: every rate is run with each of these, instead of a sweep; empty sweeps.
    """

    name: str
    lrs: tuple[float, ...]
    vote: dict[str, Any] | None = None
    linear: type[DenseLinear] | None = None
    muon: bool = False
    seeds: tuple[int, ...] = ()


def _changed(state: str, **constants: Any) -> StateKind:
    """The constants of a state with some replaced."""
    return dataclasses.replace(STATES[state], **constants)


_ADAMW_LRS = (0.002, 0.004, 0.008)
_MUON_LRS = (0.025, 0.05, 0.1)

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("trits-full", (0.025, 0.05, 0.1), vote={"state": "full"}),
        Contestant("trits-compact", (0.035, 0.07, 0.14), vote={"state": "compact"}),
        Contestant("trits-lean", (0.075, 0.15, 0.3), vote={"state": "lean"}),
        # Raw sign votes keep no momentum and have no rate; the byte tables train at their default.
        Contestant("trits-sign", (), vote={"rule": "sign", "state": "lean"}),
        Contestant("bitnet-adamw", _ADAMW_LRS, linear=BitLinear),
        Contestant("bitnet-muon", _MUON_LRS, linear=BitLinear, muon=True),
        Contestant("dense-adamw", _ADAMW_LRS, linear=DenseLinear),
        Contestant("dense-muon", _MUON_LRS, linear=DenseLinear, muon=True),
    )
}

_COMPACT_LRS = (0.0175, 0.035, 0.07)
_LEAN_LRS = (0.075, 0.1, 0.15)

# Recorded attempts at better constants of the smaller states; only `--attempts` runs them.
ATTEMPTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("trits-compact-g16", _COMPACT_LRS, vote={"state": _changed("compact", momentum_group=16)}),
        Contestant("trits-compact-beta0.7", _COMPACT_LRS, vote={"state": _changed("compact", beta=0.7)}),
        Contestant("trits-compact-beta0.9", _COMPACT_LRS, vote={"state": _changed("compact", beta=0.9)}),
        # More reluctance to flip, and more to leave a rail; the span stays 128.
        Contestant(
            "trits-lean-threshold96",
            _LEAN_LRS,
            vote={"state": _changed("lean", threshold=96, span_ratio=4 / 3, rail_ratio=2 / 3)},
        ),
        Contestant("trits-lean-rail96", _LEAN_LRS, vote={"state": _changed("lean", rail_ratio=1.2)}),
        # The sweep's steps are a factor 2 apart, and three seeds say little: those of lean spread over 0.036.
        Contestant("trits-full-more", (0.025, 0.035), vote={"state": "full"}, seeds=tuple(range(6))),
        Contestant("trits-lean-more", _LEAN_LRS, vote={"state": "lean"}, seeds=tuple(range(6))),
    )
}
ALL_CONTESTANTS = CONTESTANTS | ATTEMPTS


@dataclass(frozen=True)
class Run:
    """One training of one contestant.

    Attributes:
        contestant: its name.
        lr: peak learning rate; 0 where there is none to tune.
        seed: of initialisation, data order and stochastic rounding.
        tscale: scale groups of the trits.
        scale_lr: strength of the votes on scale exponents.
    """

    contestant: str
    lr: float
    seed: int
    tscale: str = "ROW"
    scale_lr: float = 0.0

    def __str__(self) -> str:
        extras = f" {self.tscale} scale_lr {self.scale_lr:g}" if self.tscale != "ROW" or self.scale_lr else ""
        return f"{self.contestant} lr {self.lr:g} seed {self.seed}{extras}"


class Trainee:
    """A model with its optimizers.

    Attributes:
        model: an ARBModel, of trits or a float twin.
        optimizers: stepped together.
    """

    def __init__(self, model: ARBModel, optimizers: Sequence[Optimizer], clipped: list[nn.Parameter]) -> None:
        """`clipped`: parameters whose joint gradient norm is clipped to `CLIP_NORM`."""
        self.model = model
        self.optimizers = optimizers
        self._clipped = clipped
        rates = ("lr", "scale_lr")
        self._peaks = [
            (group, {name: group[name] for name in rates if name in group})
            for optimizer in optimizers
            for group in optimizer.param_groups
        ]

    def step(self, share: float) -> None:
        """One optimizer step with `share` of the peak learning rates; gradients are dropped afterwards."""
        self.prepare(share)
        self.apply()

    def prepare(self, share: float) -> None:
        """The host's part of a step."""
        for group, peaks in self._peaks:
            group.update({name: peak * share for name, peak in peaks.items()})
        for optimizer in self.optimizers:
            if isinstance(optimizer, VoteOptimizer):
                optimizer.prepare()

    def apply(self) -> None:
        """The device's part of the step that was prepared."""
        if self._clipped:
            torch.nn.utils.clip_grad_norm_(self._clipped, CLIP_NORM)
        for optimizer in self.optimizers:
            if isinstance(optimizer, VoteOptimizer):
                optimizer.apply()
                continue
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def trunk(self) -> list[nn.Module]:
        """The modules that hold one weight matrix each; the byte tables are not among them."""
        return [m for m in self.model.modules() if isinstance(m, TernaryScaleTensor | DenseLinear)]

    def trunk_weights(self) -> int:
        """Logical weights of all matrices."""
        return sum(
            m.numel() if isinstance(m, TernaryScaleTensor) else m.in_features * m.out_features
            for m in self.trunk()
            if isinstance(m, TernaryScaleTensor | DenseLinear)
        )

    def trunk_bytes(self) -> int:
        """Bytes of every tensor that is alive between two steps for the matrices' sake.

        Weights or masters, gradients that were not dropped, and all optimizer state; counted, not computed.
        """
        total = 0
        for module in self.trunk():
            total += sum(buffer.nbytes for buffer in module.buffers(recurse=False))
            for parameter in module.parameters(recurse=False):
                total += parameter.nbytes + (0 if parameter.grad is None else parameter.grad.nbytes)
                for optimizer in self.optimizers:
                    state: dict[str, Any] = optimizer.state.get(parameter, {})
                    total += sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor))
        return total


def build(run: Run, config: ModelConfig, device: torch.device) -> Trainee:
    """A fresh model and its optimizers; all random numbers come from the run's seed."""
    contestant = ALL_CONTESTANTS[run.contestant]
    torch.manual_seed(run.seed)
    model = ARBModel(config=dataclasses.replace(config, tscale=run.tscale), device=device)
    if contestant.linear is None:
        lr = run.lr if contestant.lrs else None
        vote: dict[str, Any] = {**(contestant.vote or {}), "scale_lr": run.scale_lr}
        return Trainee(model, [VoteOptimizer(model, lr=lr, seed=run.seed, **vote)], [])
    make_twin(model, contestant.linear)
    tables = [m.weight for m in model.modules() if isinstance(m, FloatTable)]
    matrices = [m.weight for m in model.modules() if isinstance(m, DenseLinear)]
    if not contestant.muon:
        return Trainee(model, [_adamw([*matrices, *tables], run.lr, device)], [*matrices, *tables])
    # adjust_lr_fn="original" scales a step by sqrt(max(1, out/in)), which makes it lr times the standard
    # deviation that the weights start with, for every shape: the same unit as trits per step.
    muon = Muon(matrices, lr=run.lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="original")
    return Trainee(model, [muon, _adamw(tables, run.lr * TABLE_LR_SHARE, device)], [*matrices, *tables])


def _adamw(parameters: list[nn.Parameter], lr: float, device: torch.device) -> AdamW:
    return AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
