"""One optimizer step: what was captured, brought together with its state in batches of equal shape.

Single matrices of one shape are stacked, experts and table rows are gathered; all go through
`arbitor.ternary.update` and are written back. Transient memory stays within a workspace, or one matrix where
a single one is larger.

Shape letters: N tokens, O out, I in, E experts, K rows of a table that were looked up.
"""

import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from arbitor.ops.expert_linear import busy_experts
from arbitor.ops.int8_table import int8_table_step
from arbitor.ops.random_bits import random_bits, skip, step_keys
from arbitor.ops.rows import write_rows
from arbitor.ternary.capture import ExpertCapture, GradientCapture, RowCapture
from arbitor.ternary.counters import IntegerCounters
from arbitor.ternary.layers import Int8Weights, TernaryEmbeddingTable
from arbitor.ternary.tensor import IntegerModule, TernaryScaleTensor
from arbitor.ternary.update import (
    FACTORED_RULES,
    LOOKAHEAD,
    MatrixBatch,
    StepNumbers,
    VoteConstants,
    update_dense,
    update_factored,
)

ROWS_AT_ONCE = (1 << 16) - 1  # as many matrices as the second or third axis of a GPU's grid takes
_MATRIX_STATE = ("T_accum", "E_accum", "M", "M_exp")


class Step:
    """A step in progress.

    Args:
        state: the optimizer's state by parameter.
        constants: of the votes.
        seed: of the random bits.
        numbers: of the step, on every device where there is something to update.
        streams: numbers of random streams by their names, which are kept from step to step.
        ok: bool scalar on the device: False keeps every bit of weights and state.

    Attributes:
        flips: int64 scalar for every matrix that was updated.
    """

    def __init__(
        self,
        state: Mapping[Tensor, dict[str, Tensor]],
        constants: VoteConstants,
        seed: int,
        numbers: Mapping[torch.device, StepNumbers],
        streams: dict[tuple[str, ...], Tensor],
        ok: Tensor,
    ) -> None:
        self.state = state
        self.constants = constants
        self.seed = seed
        self.numbers = numbers
        self.streams = streams
        self.ok = ok
        self.flips: dict[str, Tensor] = {}

    def update_matrices(self, captured: Mapping[str, IntegerModule]) -> None:
        """Every captured module that is not int8."""
        singles: dict[str, TernaryScaleTensor] = {}
        for name, module in captured.items():
            if not isinstance(module, TernaryScaleTensor):
                continue
            if isinstance(module.capture, GradientCapture):
                singles[name] = module
            elif isinstance(module.capture, ExpertCapture):
                self.flips[name] = self._update_experts(name, module, module.capture)
            elif isinstance(module.capture, RowCapture):
                self.flips[name] = self._update_table_rows(name, module, module.capture)
        for names, stays_factored in self._groups(singles):
            self._update_group({name: singles[name] for name in names}, stays_factored)

    def update_int8(self, name: str, module: Int8Weights, beta: float) -> None:
        """A byte table, or a vector as a table of one row: steps against the sign."""
        assert isinstance(module.capture, GradientCapture)
        state = self.state[module.q]
        gradient = module.capture.gradient().to(torch.float32)
        active = gradient.any(dim=-1) & self.ok.to(gradient.device)
        int8_table_step(
            module.q.view(gradient.shape), gradient, state["M"], state["M_exp"],
            self._keys([name], gradient.device), active, self.numbers[gradient.device].table, beta, LOOKAHEAD,
        )  # fmt: skip

    def advance(self, name: str, counters: IntegerCounters) -> None:
        """Apply what counters noted."""
        device = next((b.device for b in counters.buffers()), self.ok.device)

        def bits(use: str, count: int) -> Tensor:
            return random_bits(self._keys([f"{name}.{use}"], device), count)[0]

        counters.advance(self.ok.to(device), bits)

    # -- single matrices ------------------------------------------------------------------------------------

    def _groups(self, modules: Mapping[str, TernaryScaleTensor]) -> Iterable[tuple[list[str], bool]]:
        """Names of equal shape, as many as the workspace holds; True: the gradient stays factored."""
        shapes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, module in modules.items():
            assert isinstance(module.capture, GradientCapture)
            tokens = module.capture.num_tokens
            factored = tokens is not None and self._may_stay_factored(module, tokens)
            size = (module.out_features, module.in_features, module.group, module.T_packed.device)
            shapes[type(module), *size, tokens if factored else None].append(name)
        for (*_, tokens), names in shapes.items():
            count = self._batch_size(modules[names[0]])
            for start in range(0, len(names), count):
                yield names[start : start + count], tokens is not None

    def _batch_size(self, module: TernaryScaleTensor) -> int:
        """Matrices of this shape that the workspace holds, at least one."""
        return max(1, self.constants.workspace_weights // (module.out_features * module.in_features))

    def _may_stay_factored(self, module: TernaryScaleTensor, tokens: int) -> bool:
        """Whether the direction of a gradient of so few tokens comes from two thin matrices."""
        constants = self.constants
        return (
            2 * tokens < min(module.out_features, module.in_features)
            and constants.rule in FACTORED_RULES
            and constants.momentum_bits == 0
            and not constants.votes_on_scales
            and module.E.shape[-1] == 1
            and not isinstance(module, TernaryEmbeddingTable)
        )

    def _update_group(self, group: Mapping[str, TernaryScaleTensor], stays_factored: bool) -> None:
        modules = list(group.values())
        device = modules[0].T_packed.device
        tensors = [self._tensors(module) for module in modules]
        parts = {key: _stack([t[key] for t in tensors]) for key in tensors[0]}
        keys, scale_keys = self._matrix_keys(list(group), device)
        batch = _batch(parts, modules[0].group, keys, scale_keys, self.numbers[device])
        captures = [m.capture for m in modules if isinstance(m.capture, GradientCapture)]
        if stays_factored:
            factors = [capture.factors() for capture in captures]
            a, b = _stack([a for a, _ in factors]), _stack([b for _, b in factors])
            flips = update_factored(batch, a, b, self.ok.to(device), self.constants)
        else:
            gradient = _stack([capture.gradient().to(torch.float32) for capture in captures])
            by_row = isinstance(modules[0], TernaryEmbeddingTable)
            flips = self._update_formed(batch, gradient, by_row=by_row)
        for key, part in parts.items():
            if len(modules) > 1:
                torch._foreach_copy_([t[key] for t in tensors], list(part.unbind(0)))
        self.flips |= dict(zip(group, flips.unbind(0), strict=True))

    def _update_formed(self, batch: MatrixBatch, gradient: Tensor, *, by_row: bool = False) -> Tensor:
        active = gradient.any(dim=-1, keepdim=True) & self.ok.to(gradient.device)
        if not by_row:
            active = active.any(dim=-2, keepdim=True)
        return update_dense(batch, gradient, active, self.constants, by_row=by_row)

    # -- experts --------------------------------------------------------------------------------------------

    def _update_experts(self, name: str, module: TernaryScaleTensor, capture: ExpertCapture) -> Tensor:
        """The matrices of all experts that had tokens, a batch after the other; their flips."""
        device = module.T_packed.device
        total = torch.zeros((), dtype=torch.int64, device=device)
        size = self._batch_size(module)
        if capture.dense is not None:
            for first in range(0, capture.experts, size):
                experts = slice(first, min(first + size, capture.experts))
                gradient = capture.dense[experts].to(torch.float32)
                batch = self._of_experts(name, module, experts)
                total += self._update_formed(batch, gradient).sum()
            return total
        activations, gradients, offsets = capture.sorted_rows()
        tokens = len(activations)
        if device.type == "cuda" and capture.experts <= size and not self._may_stay_factored(module, tokens):
            # All at once, those without tokens as zeros: no question to the device.
            gradient = capture.product().to(torch.float32)
            batch = self._of_experts(name, module, slice(0, capture.experts))
            return self._update_formed(batch, gradient).sum()
        if not self._may_stay_factored(module, tokens):
            return self._update_busy_experts(name, module, activations, gradients, offsets)
        owner = torch.searchsorted(offsets, torch.arange(tokens, device=device), right=True)
        for experts in busy_experts(offsets, tokens)[0].split(size):
            mine = (owner == experts[:, None])[..., None]
            a, b = (mine * rows.to(torch.float32) for rows in (activations, gradients))
            with self._of_some_experts(name, module, experts) as batch:
                total += update_factored(batch, a, b, self.ok.to(device), self.constants).sum()
        return total

    def _update_busy_experts(
        self, name: str, module: TernaryScaleTensor, activations: Tensor, gradients: Tensor, offsets: Tensor
    ) -> Tensor:
        """One expert after the other, of as many tokens as each has, which the host must know."""
        device = module.T_packed.device
        total = torch.zeros((), dtype=torch.int64, device=device)
        ends = offsets.tolist()
        for expert, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if first == last:
                continue
            a, b = activations[first:last], gradients[first:last]
            batch = self._of_experts(name, module, slice(expert, expert + 1))
            if self._may_stay_factored(module, last - first):
                factors = a.to(torch.float32)[None], b.to(torch.float32)[None]
                total += update_factored(batch, *factors, self.ok.to(device), self.constants).sum()
            else:
                gradient = (b.t() @ a.to(b.dtype)).to(torch.float32)
                total += self._update_formed(batch, gradient[None]).sum()
        return total

    def _of_experts(self, name: str, module: TernaryScaleTensor, experts: slice) -> MatrixBatch:
        """The matrices of neighbouring experts with their state, as views."""
        tensors = self._expert_tensors(module)
        numbers = torch.arange(experts.start, experts.stop, device=module.T_packed.device)
        return self._expert_batch(name, module, {k: t[experts] for k, t in tensors.items()}, numbers)

    @contextmanager
    def _of_some_experts(
        self, name: str, module: TernaryScaleTensor, experts: Tensor
    ) -> Iterator[MatrixBatch]:
        """The matrices of `experts`, int64 [n], with their state; written back at the end."""
        tensors = self._expert_tensors(module)
        parts = {key: tensor.index_select(0, experts) for key, tensor in tensors.items()}
        yield self._expert_batch(name, module, parts, experts)
        for key, tensor in tensors.items():
            write_rows(tensor, experts, parts[key])

    def _expert_tensors(self, module: TernaryScaleTensor) -> dict[str, Tensor]:
        """Weights and state by key, the leading dimensions as one."""
        return {key: tensor.flatten(0, -3) for key, tensor in self._tensors(module).items()}

    def _expert_batch(
        self, name: str, module: TernaryScaleTensor, parts: Mapping[str, Tensor], numbers: Tensor
    ) -> MatrixBatch:
        keys, scale_keys = self._matrix_keys([name], numbers.device)
        return _batch(
            parts,
            module.group,
            skip(keys, numbers * (module.out_features * module.in_features)),
            None if scale_keys is None else skip(scale_keys, numbers * parts["E"][0].numel()),
            self.numbers[numbers.device],
        )

    # -- tables ---------------------------------------------------------------------------------------------

    def _update_table_rows(self, name: str, module: TernaryScaleTensor, capture: RowCapture) -> Tensor:
        """The rows of a large table that were looked up, each as a matrix of its own; their flips."""
        ids, gradient = capture.touched()
        total = torch.zeros((), dtype=torch.int64, device=ids.device)
        size = max(1, min(self.constants.workspace_weights // module.in_features, ROWS_AT_ONCE))
        first_place = torch.searchsorted(ids, ids)
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            # The last row comes again and again; it has moved if it was in an earlier part.
            fresh = first_place[part] >= start
            flips = self._update_some_rows(name, module, ids[part], gradient[part], fresh)
            places = torch.arange(start, start + len(flips), device=ids.device)
            total += (flips * (first_place[part] == places)).sum()
        return total.to(self.ok.device)

    def _update_some_rows(
        self, name: str, module: TernaryScaleTensor, ids: Tensor, gradient: Tensor, fresh: Tensor
    ) -> Tensor:
        """Rows `ids`, where those that come twice come with equal values; flips int64 [n]."""
        tensors = self._tensors(module)
        parts = {key: tensor[ids][:, None] for key, tensor in tensors.items()}
        keys, scale_keys = self._matrix_keys([name], ids.device)
        batch = _batch(
            parts,
            module.group,
            skip(keys, ids * module.in_features),
            None if scale_keys is None else skip(scale_keys, ids * module.E.shape[-1]),
            self.numbers[ids.device],
        )
        active = (gradient.any(dim=-1) & fresh)[:, None, None] & self.ok.to(ids.device)
        rule = "sign" if self.constants.rule == "sign" else "row"
        constants = dataclasses.replace(self.constants, rule=rule)
        flips = update_dense(batch, gradient[:, None].contiguous(), active, constants)
        for key, tensor in tensors.items():
            write_rows(tensor, ids, parts[key][:, 0])
        return flips

    # -- common ---------------------------------------------------------------------------------------------

    def _tensors(self, module: TernaryScaleTensor) -> dict[str, Tensor]:
        """Weights and state of a module by key."""
        state = self.state[module.T_packed]
        kept = {key: state[key] for key in _MATRIX_STATE if key in state}
        return {"T_packed": module.T_packed.data, "E": module.E.data, **kept}

    def _keys(self, names: Iterable[str], device: torch.device) -> Tensor:
        """int32 [n, 2]: the random stream of each name in this step."""
        names = tuple(names)
        if (streams := self.streams.get(names)) is None or streams.device != device:
            numbers = [zlib.crc32(name.encode()) for name in names]
            streams = torch.tensor(numbers, dtype=torch.int64).to(torch.int32).to(device)
            self.streams[names] = streams
        return step_keys(self.seed, self.numbers[device].count, streams)

    def _matrix_keys(self, names: list[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Streams of matrices and, if they move, of their exponents."""
        scales = self.constants.votes_on_scales
        return self._keys(names, device), self._keys([f"{n}.E" for n in names], device) if scales else None


def _stack(tensors: list[Tensor]) -> Tensor:
    """[n, ...]; of a single tensor a view, so that a large matrix is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _batch(
    parts: Mapping[str, Tensor],
    group: int,
    keys: Tensor,
    scale_keys: Tensor | None,
    numbers: StepNumbers,
) -> MatrixBatch:
    return MatrixBatch(
        packed=parts["T_packed"],
        exponent=parts["E"],
        accumulator=parts["T_accum"],
        scale_accumulator=parts["E_accum"],
        momentum=(parts["M"], parts["M_exp"]) if "M" in parts else None,
        group=group,
        keys=keys,
        scale_keys=scale_keys,
        numbers=numbers,
    )
