"""VoteOptimizer: integer training state and the one place where weights change."""

import copy
import inspect
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.ops.backend import requested_backend, uses_triton
from arbitor.ops.momentum import GROUP
from arbitor.ops.state_update import MAX_SCALE_EXPONENT, MIN_SCALE_EXPONENT
from arbitor.ops.trit_codec import trit_unpack
from arbitor.ternary.capture import (
    ROUNDING_MARGIN,
    Capture,
    ExpertCapture,
    GradientCapture,
    MatrixCapture,
    RowCapture,
    outside_autocast,
)
from arbitor.ternary.counters import named_counters
from arbitor.ternary.layers import Int8Weights, TernaryEmbeddingTable
from arbitor.ternary.rules import get_rule
from arbitor.ternary.step import Step
from arbitor.ternary.tensor import RESIDUAL_UNITS, IntegerModule, TernaryScaleTensor, named_ternary
from arbitor.ternary.tied import untied
from arbitor.ternary.update import WORKSPACE_BYTES_PER_WEIGHT, StepNumbers, VoteConstants

TABLE_STEP = 32  # table units (1/64 of a weight) a trit of learning rate: lr / 2 * 64
SIGN_THRESHOLD = 32
_NO_MOMENTUM = 0x88  # two 4-bit codes of 0


@dataclass(frozen=True)
class StateKind:
    """What training keeps for each weight of a matrix, and the constants that suit it.

    Attributes:
        momentum_bits: 8, 4, or 0 for none.
        beta: of the matrices' momentum.
        table_beta: of the byte tables' momentum, which is always int8.
        lr: peak learning rate, trits per step.
        threshold: accumulator value at which a trit flips.
        span_ratio: span over threshold.
        rail_ratio: rail limit over threshold; None for threshold - 1.
        workspace_bytes: about how much transient memory a step may take beside one matrix's gradient.
        momentum_group: neighbours that share an exponent of the matrices' momentum, 32 or 16; tables have 32.
    """

    momentum_bits: int
    beta: float
    table_beta: float
    lr: float
    threshold: int
    span_ratio: float
    rail_ratio: float | None
    workspace_bytes: int
    momentum_group: int = GROUP


STATES = {
    "full": StateKind(8, 0.9, 0.9, 0.05, 64, 2.0, None, 256 << 20),
    "compact": StateKind(4, 0.8, 0.8, 0.07, 64, 2.0, None, 256 << 20),
    "lean": StateKind(0, 0.0, 0.9, 0.15, 80, 1.6, 0.8, 96 << 20),
}
SIGN_LR = STATES["full"].lr  # of the tables, when matrices vote by sign


class VoteOptimizer(torch.optim.Optimizer):
    """Trains ternary matrices and int8 tables by integer votes.

    Gradients are captured by `loss.backward()` and accumulate until `step()`, which alone changes weights
    and state; `torch.autograd.grad(loss, x)` and `backward(inputs=...)` leave nothing. Attaching takes over
    the residuals that initialisation left; on a model loaded from a file the accumulators start at zero. A
    second optimizer on the same model replaces the first. Modules that share their parameters vote once.

    Loading weights into the model keeps the state, as with any torch optimizer: load the state that belongs
    to them too, in any order, or call `reset_state()`.

    Args:
        model: holds TernaryScaleTensor, Int8Embedding and Int8Vector modules, and counters; everything else
            is left alone.
        lr: trits per step; None takes the state's own (full 0.05, compact 0.07, lean 0.15), the peak for some
            500 steps; longer runs want less, by the root of the length. Rule `sign` uses it for the byte
            tables only.
        rule: direction of the vote: spectral, sinkhorn, row or sign.
        state: full (int8 momentum), compact (4-bit) or lean (none), or other constants than theirs. With rule
            `sign` matrices have no momentum in any of them.
        seed: of the stochastic rounding.
        accum_threshold: accumulator value at which a trit flips; sets span and rail limit along with it.
        e_accum_threshold: votes that make a scale exponent move by one octave.
        scale_lr: strength of the votes on scale exponents, octaves per step; 0 freezes them.

    Attributes:
        update_scales: False keeps scale exponents in coming steps whatever `scale_lr` is.

    Raises:
        UserError: a name or value that is not allowed, or a model without ternary weights.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        rule: str = "spectral",
        state: str | StateKind = "full",
        seed: int = 0,
        *,
        accum_threshold: int | None = None,
        e_accum_threshold: int = 32,
        scale_lr: float = 0.0,
    ) -> None:
        requested_backend()
        if not isinstance(model, nn.Module):
            raise UserError(
                f"VoteOptimizer takes the model itself, got {type(model).__name__}: trits are no parameters; "
                "write VoteOptimizer(model)"
            )
        if isinstance(state, str) and state not in STATES:
            raise UserError(f"unknown state {state!r}; choose one of {', '.join(STATES)}")
        get_rule(rule)
        self.rule = rule
        self.kind = STATES[state] if isinstance(state, str) else state
        self.state_name = state if isinstance(state, str) else str(state)
        if rule == "sign":
            self.kind = replace(self.kind, momentum_bits=0, beta=0.0, lr=SIGN_LR)
        rates = {"lr": self.kind.lr if lr is None else lr, "scale_lr": scale_lr}
        _refuse_bad_rates(rates)
        self.seed = seed
        self.step_count = 0
        self._modules, self._tied = untied(named_ternary(model))
        self._counters = dict(named_counters(model))
        if not self._modules:
            raise UserError(
                "the model has no ternary weights to train; convert its linears to TernaryLinear first"
            )
        self._set_thresholds(accum_threshold, e_accum_threshold)
        weights = [module.stored for module in self._modules.values()]
        super().__init__(weights, rates)
        self._dropped = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        self._last_ok = torch.ones((), dtype=torch.bool, device=weights[0].device)
        self._loss_ok: Tensor | None = None
        self.update_scales = True
        self._votes_on_scales = False
        self._numbers: dict[torch.device, StepNumbers] = {}
        self._streams: dict[tuple[str, ...], Tensor] = {}
        self.flips: dict[str, Tensor] = {}
        for module in self._modules.values():
            self._attach(module)
        for module, owner in self._tied:
            module.capture = owner.capture
        for counters in self._counters.values():
            counters.attached = True
            counters.forget()

    # -- construction ---------------------------------------------------------------------------------------

    def _set_thresholds(self, accum_threshold: int | None, e_accum_threshold: int) -> None:
        sign = self.rule == "sign"
        default = SIGN_THRESHOLD if sign else self.kind.threshold
        theta = default if accum_threshold is None else accum_threshold
        _refuse_bad_thresholds(theta, e_accum_threshold)
        ratio = self.kind.rail_ratio
        self.accum_threshold = theta
        self.e_accum_threshold = e_accum_threshold
        self.span = round((2.0 if sign else self.kind.span_ratio) * theta)
        if sign:
            self.rail = theta
        else:
            self.rail = theta - 1 if ratio is None else round(ratio * theta)

    def configure(self, accum_threshold: int | None = None, e_accum_threshold: int | None = None) -> None:
        """Change thresholds during a run; live accumulators are rescaled with the span.

        Args:
            accum_threshold: flips; span and rail limit follow. None keeps the present one.
            e_accum_threshold: scale exponents; None keeps the present one.
        """
        old_span = self.span
        self._set_thresholds(
            self.accum_threshold if accum_threshold is None else accum_threshold,
            self.e_accum_threshold if e_accum_threshold is None else e_accum_threshold,
        )
        if self.span == old_span:
            return
        for module in self._matrices.values():
            accumulator = self._state_of(module)["T_accum"]
            trits = _unpacked(module).to(torch.int16)
            scaled = (accumulator.to(torch.float32) * (self.span / old_span)).round_().to(torch.int16)
            scaled -= (scaled * trits - self.rail).clamp_(min=0) * trits
            accumulator.copy_(scaled.clamp_(-127, 127))

    def apply_scale_steps(self, module: TernaryScaleTensor) -> int:
        """Apply the whole steps that wait in a matrix's scale accumulator; how many exponents moved.

        A step applies them itself; some wait only after the threshold was lowered.
        """
        accumulator = self._state_of(module)["E_accum"]
        whole = torch.div(accumulator, self.e_accum_threshold, rounding_mode="trunc")
        before = module.E.clone()
        with torch.no_grad():
            module.E.copy_((module.E.to(torch.int16) + whole).clamp_(MIN_SCALE_EXPONENT, MAX_SCALE_EXPONENT))
            accumulator -= whole * self.e_accum_threshold
        return int((before != module.E).sum())

    def _attach(self, module: IntegerModule) -> None:
        capture: Capture
        if isinstance(module, TernaryScaleTensor):
            self.state[module.T_packed] = self._new_matrix_state(module)
            rows, columns = module.out_features, module.in_features
            if module.leading_shape:
                capture = ExpertCapture(math.prod(module.leading_shape), rows, columns)
            elif isinstance(module, TernaryEmbeddingTable) and module.sparse:
                capture = RowCapture(rows, columns)
            else:
                capture = GradientCapture(rows, columns)
        else:
            assert isinstance(module, Int8Weights)
            rows, columns = (1, *module.q.shape)[-2:]
            self.state[module.q] = self._new_momentum((rows,), columns, 8, GROUP, module.q.device)
            capture = GradientCapture(rows, columns)
        capture.optimizer = weakref.ref(self)
        module.capture = capture

    def _new_matrix_state(self, module: TernaryScaleTensor) -> dict[str, Tensor]:
        rows = (*module.leading_shape, module.out_features)
        device = module.T_packed.device
        if module.T_residual is None:
            accumulator = torch.zeros((*rows, module.in_features), dtype=torch.int8, device=device)
        elif self.span == RESIDUAL_UNITS:
            accumulator = module.T_residual
        else:
            scaled = (module.T_residual.to(torch.float32) * (self.span / RESIDUAL_UNITS)).round_()
            accumulator = scaled.to(torch.int8)
        module.T_residual = None
        state = {"T_accum": accumulator, "E_accum": torch.zeros_like(module.E)}
        if self.kind.momentum_bits:
            state |= self._new_momentum(
                rows, module.in_features, self.kind.momentum_bits, self.kind.momentum_group, device
            )
        return state

    @staticmethod
    def _new_momentum(
        rows: tuple[int, ...], columns: int, bits: int, group: int, device: torch.device
    ) -> dict[str, Tensor]:
        if bits == 8:
            codes = torch.zeros((*rows, columns), dtype=torch.int8, device=device)
        else:
            codes = torch.full((*rows, -(-columns // 2)), _NO_MOMENTUM, dtype=torch.uint8, device=device)
        exponent = torch.zeros((*rows, -(-columns // group)), dtype=torch.int16, device=device)
        return {"M": codes, "M_exp": exponent}

    def detach(self) -> None:
        """Stop capturing: the model's layers keep no gradient any more."""
        for module in (*self._modules.values(), *(tied for tied, _ in self._tied)):
            module.capture = None
        for counters in self._counters.values():
            counters.forget()
            counters.attached = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what is trained are the integer weights of the model, in one group."""
        if self.param_groups:
            raise UserError(
                "VoteOptimizer has one group, the model's integer weights; train float parameters with "
                "another optimizer"
            )
        # Unwrapped: torch's wrapper would import its compiler, which takes a second, to keep it out of this.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def refuse_tied(self, module: IntegerModule) -> None:
        """UserError if `module` shares its parameters with another, which new parameters would end."""
        if any(module in pair for pair in self._tied):
            raise UserError("weights that two modules share cannot be assigned; load with assign=False")

    def follow(self, module: IntegerModule, before: nn.Parameter) -> None:
        """Keep the state of `module`, whose parameter `before` was replaced by `module.stored`."""
        if before not in self.state:
            return
        state, stored = self.state.pop(before), module.stored
        self.state[stored] = {key: tensor.to(stored.device) for key, tensor in state.items()}
        parameters = self.param_groups[0]["params"]
        parameters[:] = [stored if parameter is before else parameter for parameter in parameters]

    def _state_of(self, module: IntegerModule) -> dict[str, Tensor]:
        """Training state of `module`; UserError if its parameter is not the one that it was made for."""
        if module.stored not in self.state:
            name = next((name for name, own in self._modules.items() if own is module), "a module")
            raise UserError(
                f"the parameter of {name} was replaced after this optimizer was attached; copy into it "
                "instead, or attach a new optimizer"
            )
        return self.state[module.stored]

    # -- the step -------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what backward captured since the last step."""
        for module in self._modules.values():
            if module.capture is not None:
                module.capture.clear()
        for counters in self._counters.values():
            counters.forget()
        self.forget_loss()

    @property
    def has_captures(self) -> bool:
        """Whether a backward left a gradient for the coming step."""
        captures = (module.capture for module in self._modules.values())
        return any(capture is not None and not capture.empty for capture in captures)

    def forget_loss(self) -> None:
        """Drop the noted losses."""
        self._loss_ok = None

    def note_loss(self, loss: Tensor) -> None:
        """A loss that is not finite drops the coming step, as a gradient that is not finite does."""
        ok = torch.isfinite(loss.detach()).all()
        self._loss_ok = ok if self._loss_ok is None else self._loss_ok & ok

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Turn captured gradients into votes, flips and new momentum; then drop them.

        If the noted loss or any captured gradient is not finite, weights and state stay bit-identical, and
        the step is counted as dropped. A matrix, expert or table row without a gradient stays as it is.

        Args:
            closure: computes the loss and its backward; optional.

        Returns:
            What the closure returned.

        Raises:
            UserError: a rate in `param_groups` is not finite or negative; nothing has changed.
        """
        loss = None
        if closure is not None:
            _refuse_bad_rates(self.param_groups[0])
            with torch.enable_grad():
                loss = closure()
        self.prepare()
        self.apply()
        return loss

    def prepare(self) -> None:
        """The host's part of a step: whatever changes from one to the next is written to the devices.

        A CUDA graph that recorded `apply` reads it there. Nothing waits for a device.

        Raises:
            UserError: a rate in `param_groups` is not finite or negative; nothing has changed.
        """
        group = self.param_groups[0]
        _refuse_bad_rates(group)
        vote = 1.0 if self.rule == "sign" else float(group["lr"]) * self.span
        scale = float(group["scale_lr"]) * self.e_accum_threshold if self.update_scales else 0.0
        self._votes_on_scales = scale > 0
        for device in self._devices():
            if device not in self._numbers:
                self._numbers[device] = StepNumbers(device)
            self._numbers[device].write(self.step_count, vote, float(group["lr"]) * TABLE_STEP, scale)
        self.step_count += 1

    @torch.no_grad()
    def apply(self) -> None:
        """The devices' part of the step that was prepared: captured gradients become votes, and are dropped.

        On a GPU it may be recorded into a CUDA graph, unless the host waits in it: where the experts of a
        matrix are too large for the workspace, their tokens few and their gradients not factors (which they
        are in lean state with the rules spectral and row), or a memory is on the host.
        """
        captured = {
            name: m for name, m in self._modules.items() if m.capture is not None and not m.capture.empty
        }
        ok, norms = self._all_finite(captured)
        self.flips = {}
        if ok.is_cuda or bool(ok):
            self._update_all(captured, ok, norms)
        self._last_ok = ok
        self._dropped += ~ok
        self.zero_grad()

    def _devices(self) -> set[torch.device]:
        """Where there is something to update."""
        buffers = (next(counters.buffers(), None) for counters in self._counters.values())
        counted = {self._last_ok.device if buffer is None else buffer.device for buffer in buffers}
        return {module.stored.device for module in self._modules.values()} | counted

    def _all_finite(self, modules: Mapping[str, IntegerModule]) -> tuple[Tensor, dict[str, Tensor]]:
        """One flag on the device: the noted loss and every captured gradient are finite.

        Also, by name, the largest magnitude of gradients that were formed and had to be looked at.
        """
        looked_at: dict[tuple[torch.device, torch.dtype], list[tuple[str | None, Tensor]]] = defaultdict(list)
        plain: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for name, module in modules.items():
            capture = module.capture
            if isinstance(capture, MatrixCapture) and uses_triton(module.stored) and capture.plain_gradients:
                for tensor in capture.plain_gradients:
                    plain[tensor.device, tensor.dtype].append(tensor)
            elif capture is not None:
                for tensor in capture.magnitudes():
                    whole = isinstance(capture, GradientCapture) and tensor is capture.dense
                    looked_at[tensor.device, tensor.dtype].append((name if whole else None, tensor))
        ok = torch.ones_like(self._last_ok)
        if self._loss_ok is not None:
            ok = ok & self._loss_ok.to(ok.device)
        for group in plain.values():
            # One bound for all, in a few launches: no sum of products can be larger.
            sums = torch.stack(torch._foreach_norm(group, 1, dtype=torch.float32))
            ok = ok & torch.isfinite(sums.sum() * (127 * ROUNDING_MARGIN)).to(ok.device)
        norms: dict[str, Tensor] = {}
        # Of one dtype, which torch looks at in a few launches.
        for (device, _), pairs in looked_at.items():
            names, tensors = zip(*pairs, strict=True)
            if device.type == "cpu" and _surely_finite(list(tensors)):
                continue
            largest = torch._foreach_norm(list(tensors), math.inf)
            norms |= {name: norm for name, norm in zip(names, largest, strict=True) if name is not None}
            # Beyond the range of what the update works in, a number is not finite.
            ok = ok & torch.isfinite(torch.stack(largest).to(torch.float32)).all().to(ok.device)
        return ok, norms

    @outside_autocast()
    def _update_all(
        self, captured: Mapping[str, IntegerModule], ok: Tensor, norms: Mapping[str, Tensor] | None = None
    ) -> None:
        constants = VoteConstants(
            rule=self.rule,
            span=self.span,
            threshold=self.accum_threshold,
            rail=self.rail,
            momentum_bits=self.kind.momentum_bits,
            beta=self.kind.beta,
            votes_on_scales=self._votes_on_scales,
            scale_threshold=self.e_accum_threshold,
            workspace_weights=self.kind.workspace_bytes // WORKSPACE_BYTES_PER_WEIGHT,
        )
        step = Step(self.state, constants, self.seed, self._numbers, self._streams, ok, norms or {})
        step.update_matrices(captured)
        for name, module in captured.items():
            if isinstance(module, Int8Weights):
                step.update_int8(name, module, self.kind.table_beta)
        for name, counters in self._counters.items():
            step.advance(name, counters)
        self.flips = step.flips

    # -- what it tells --------------------------------------------------------------------------------------

    @property
    def _matrices(self) -> dict[str, TernaryScaleTensor]:
        return {n: m for n, m in self._modules.items() if isinstance(m, TernaryScaleTensor)}

    @property
    def dropped_steps(self) -> int:
        """Steps dropped because a loss or gradient was not finite (synchronises the device)."""
        return int(self._dropped)

    @property
    def last_step_ok(self) -> Tensor:
        """Whether the last step changed state: a bool scalar on the device, a new one every step."""
        return self._last_ok

    @property
    def last_step_applied(self) -> bool:
        """As `last_step_ok`, on the host (synchronises the device)."""
        return bool(self._last_ok)

    def flip_rate(self) -> float:
        """Share of all trits that flipped in the last step (synchronises the device)."""
        total = sum(m.numel() for m in self._matrices.values())
        flips = [count.to(self._dropped.device) for count in self.flips.values()]
        return float(torch.stack(flips).sum()) / total if flips else 0.0

    def layer_metrics(self) -> dict[str, dict[str, float]]:
        """For each matrix: flip_rate of the last step, zero_share (T = 0) and rail_share (held at a rail)."""
        metrics = {}
        for name, module in self._matrices.items():
            trits = _unpacked(module)
            outwards = trits * self._state_of(module)["T_accum"]
            flips = int(self.flips[name]) if name in self.flips else 0
            metrics[name] = {
                "flip_rate": flips / module.numel(),
                "zero_share": float((trits == 0).float().mean()),
                "rail_share": float((outwards >= self.rail).float().mean()),
            }
        return metrics

    # -- saving ---------------------------------------------------------------------------------------------

    def named_state(self) -> dict[str, Tensor]:
        """All integer training state by name: `<module>.T_accum`, `.E_accum`, `.M`, `.M_exp`."""
        named: dict[str, Tensor] = {}
        for name, module in self._modules.items():
            named |= {f"{name}.{key}": value for key, value in self._state_of(module).items()}
        return dict(sorted(named.items()))

    def load_named_state(self, named: Mapping[str, Tensor]) -> None:
        """Put back what `named_state` gave, by copying.

        Raises:
            UserError: a tensor is missing, too much, or of another shape or dtype; nothing has changed.
        """
        self._refuse_misfit(named)
        for name, tensor in self.named_state().items():
            tensor.copy_(named[name])

    def reset_state(self) -> None:
        """Accumulators and momentum start anew, at zero, and what was captured is dropped.

        For a model whose weights were replaced by others: what is left of the former ones, up to half a trit
        in every accumulator, would be added to them.
        """
        for name, tensor in self.named_state().items():
            tensor.fill_(_NO_MOMENTUM if name.endswith(".M") and tensor.dtype == torch.uint8 else 0)
        self.zero_grad()

    def _refuse_misfit(self, named: Mapping[str, Tensor]) -> None:
        own = self.named_state()
        missing, extra = (
            sorted(own.keys() - named.keys()),
            sorted(named.keys() - own.keys()),
        )
        if missing or extra:
            raise UserError(
                f"optimizer state does not fit the model: {len(missing)} missing {missing[:3]}, "
                f"{len(extra)} unknown {extra[:3]}; was it saved with another --state or model?"
            )
        for name, tensor in own.items():
            given = named[name]
            if not isinstance(given, Tensor):
                raise UserError(f"optimizer state {name} is no tensor but a {type(given).__name__}")
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise UserError(
                    f"optimizer state {name} is {given.dtype} {tuple(given.shape)}, "
                    f"expected {tensor.dtype} {tuple(tensor.shape)}"
                )

    def hyperparameters(self) -> dict[str, Any]:
        """Plain values that belong to the state: rule, kind, seed, thresholds and counters."""
        return {
            "rule": self.rule,
            "state": self.state_name,
            "seed": self.seed,
            "accum_threshold": self.accum_threshold,
            "e_accum_threshold": self.e_accum_threshold,
            "step_count": self.step_count,
            "dropped_steps": self.dropped_steps,
        }

    def load_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Put back what `hyperparameters` gave.

        Raises:
            UserError: a value is missing or not allowed, or rule or state differ; nothing has changed.
        """
        self._refuse_bad_hyperparameters(values)
        self.seed = values["seed"]
        self._set_thresholds(values["accum_threshold"], values["e_accum_threshold"])
        self.step_count = values["step_count"]
        self._dropped.fill_(values["dropped_steps"])

    def _refuse_bad_hyperparameters(self, values: Mapping[str, Any]) -> None:
        own = self.hyperparameters()
        if missing := sorted(own.keys() - values.keys()):
            raise UserError(f"the saved optimizer has no {', '.join(missing)}: it is of another kind")
        for key in ("rule", "state"):
            if values[key] != own[key]:
                raise UserError(f"the saved optimizer has {key} {values[key]!r}, this one {own[key]!r}")
        for key in own.keys() - {"rule", "state"}:
            if type(values[key]) is not int:
                raise UserError(f"the saved optimizer has {key} {values[key]!r}, which is no whole number")
        _refuse_bad_thresholds(values["accum_threshold"], values["e_accum_threshold"])

    def state_dict(self) -> dict[str, Any]:
        """torch's form, with the plain values of `hyperparameters` beside it."""
        return {**super().state_dict(), "hyperparameters": self.hyperparameters()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; tensors are copied. Hooks for loading are not called.

        Raises:
            UserError: it is of another model or kind, or damaged; nothing has changed.
        """
        if missing := sorted({"state", "param_groups", "hyperparameters"} - state_dict.keys()):
            raise UserError(f"this is no state_dict of a VoteOptimizer: it has no {', '.join(missing)}")
        names = dict(enumerate(self._modules))  # torch counts parameters in the order of the modules
        named = {
            f"{names.get(index, index)}.{key}": tensor
            for index, tensors in state_dict["state"].items()
            for key, tensor in tensors.items()
        }
        (group,) = self.param_groups
        saved_groups = state_dict["param_groups"]
        self._refuse_bad_hyperparameters(state_dict["hyperparameters"])
        self._refuse_misfit(named)
        if len(saved_groups) != 1 or len(saved_groups[0].get("params", ())) != len(group["params"]):
            raise UserError("the saved optimizer does not have the one group of this model's weights")
        _refuse_bad_rates(saved_groups[0])
        self.load_hyperparameters(state_dict["hyperparameters"])
        self.load_named_state(named)
        group.update({k: copy.deepcopy(v) for k, v in saved_groups[0].items() if k != "params"})

    def state_bytes(self) -> int:
        """Bytes of everything kept between steps: weights, exponents, tables, accumulators, momentum."""
        weights = sum(p.nbytes for m in self._modules.values() for p in m.parameters(recurse=False))
        return weights + sum(t.nbytes for t in self.named_state().values())


def _refuse_bad_rates(rates: Mapping[str, Any]) -> None:
    for key, what in (("lr", "learning rate"), ("scale_lr", "learning rate of scales (scale_lr)")):
        value = rates.get(key)
        if not isinstance(value, (Real, Tensor)) or not 0 <= float(value) < math.inf:
            raise UserError(f"the {what} must be a finite number that is not negative, got {value}")


def _refuse_bad_thresholds(accum_threshold: int, e_accum_threshold: int) -> None:
    if not 2 <= accum_threshold <= 127:
        raise UserError(f"accum_threshold must be between 2 and 127, got {accum_threshold}")
    if not 1 <= e_accum_threshold <= 127:
        raise UserError(f"e_accum_threshold must be between 1 and 127, got {e_accum_threshold}")


def _surely_finite(tensors: list[Tensor]) -> bool:
    """Whether their 2-norms, which a CPU finds much faster than their largest elements, are all finite.

    What is finite may have a square that is not.
    """
    norms = torch.stack([norm.to(torch.float32) for norm in torch._foreach_norm(tensors)])
    return bool(torch.isfinite(norms).all())


def _unpacked(module: TernaryScaleTensor) -> Tensor:
    return trit_unpack(module.T_packed, module.in_features)
