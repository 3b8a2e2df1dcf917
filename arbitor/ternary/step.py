"""One optimizer step: what was captured, brought together with its state in batches of equal shape.

Single matrices of one shape are stacked, experts and table rows are gathered; all go through
`arbitor.ternary.update` and are written back. Transient memory stays within a workspace, or one matrix where
a single one is larger.

Shape letters: N tokens, O out, I in, E experts, K rows of a table that were looked up.
"""

import dataclasses
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arbitor.ops.backend import uses_triton
from arbitor.ops.int8_table import int8_table_step
from arbitor.ops.random_bits import random_bits, skip, step_keys
from arbitor.ops.rows import write_rows
from arbitor.ternary.capture import ExpertCapture, GradientCapture, RowCapture
from arbitor.ternary.counters import IntegerCounters
from arbitor.ternary.joined import may_join, may_step_table, update_joined, update_table
from arbitor.ternary.layers import Int8Weights, TernaryEmbeddingTable
from arbitor.ternary.tensor import IntegerModule, TernaryScaleTensor
from arbitor.ternary.update import (
    FACTORED_RULES,
    LOOKAHEAD,
    WORKSPACE_BYTES_PER_WEIGHT,
    ApartBatch,
    FactoredBatch,
    MatrixBatch,
    StepNumbers,
    VoteConstants,
    transient_bytes,
    update_apart,
    update_dense,
    update_factored,
)

MOST_FACTORED_TOKENS = 1024  # of experts together, where kernels run: the product of their pairs is small
ROWS_AT_ONCE = (1 << 16) - 1  # as many matrices as the second or third axis of a GPU's grid takes
_MATRIX_STATE = ("T_accum", "E_accum", "M", "M_exp")


@dataclass(frozen=True)
class _Factored:
    """Matrices of one shape, or those of experts, whose gradients stay factors of so many tokens."""

    names: list[str]
    modules: list[TernaryScaleTensor]
    tokens: int

    @property
    def device(self) -> torch.device:
        return self.modules[0].T_packed.device

    @property
    def numbers(self) -> int:
        return _numbers(self.modules[0], self.tokens) * len(self.modules)

    def belongs_with(self, other: "_Factored") -> bool:
        return (self.tokens, self.device) == (other.tokens, other.device)


def _numbers(module: TernaryScaleTensor, tokens: int) -> int:
    """Numbers of both factors of a matrix's gradient."""
    return tokens * (module.out_features + module.in_features)


class Step:
    """A step in progress.

    Args:
        state: the optimizer's state by parameter.
        constants: of the votes.
        seed: of the random bits.
        numbers: of the step, on every device where there is something to update.
        streams: numbers of random streams by their names, which are kept from step to step.
        ok: bool scalar on the device: False keeps every bit of weights and state.
        norms: scalars by the names of modules whose gradient was looked at: its largest magnitude.

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
        norms: Mapping[str, Tensor],
    ) -> None:
        self.state = state
        self.constants = constants
        self.seed = seed
        self.numbers = numbers
        self.streams = streams
        self.ok = ok
        self.norms = norms
        self.flips: dict[str, Tensor] = {}

    def update_matrices(self, captured: Mapping[str, IntegerModule]) -> None:
        """Every captured module that is not int8."""
        singles: dict[str, TernaryScaleTensor] = {}
        factored: list[_Factored] = []
        for name, module in captured.items():
            if not isinstance(module, TernaryScaleTensor):
                continue
            if isinstance(module.capture, GradientCapture):
                singles[name] = module
            elif isinstance(module.capture, ExpertCapture):
                if (tokens := self._factored_tokens(module, module.capture)) is not None:
                    factored.append(_Factored([name], [module], tokens))
                else:
                    self.flips[name] = self._update_experts(name, module, module.capture)
            elif isinstance(module.capture, RowCapture):
                self.flips[name] = self._update_table_rows(name, module, module.capture)
        for names in self._joined(singles):
            self._update_joined({name: singles.pop(name) for name in names})
        for names, tokens in self._groups(singles):
            if tokens is None and self._moves_apart(singles[names[0]]):
                self._update_apart({name: singles[name] for name in names})
            elif tokens is None:
                self._update_group({name: singles[name] for name in names})
            else:
                factored.append(_Factored(names, [singles[name] for name in names], tokens))
        for together in self._chunks(factored):
            self._update_factored(together)

    def update_int8(self, name: str, module: Int8Weights, beta: float) -> None:
        """A byte table, or a vector as a table of one row: steps against the sign."""
        assert isinstance(module.capture, GradientCapture)
        state = self.state[module.q]
        if may_step_table(module.q):
            gradient = module.capture.gradient().to(torch.float32, copy=True)
            keys = self._keys([name], gradient.device)
            numbers = self.numbers[gradient.device]
            update_table(module.q.data, state["M"], state["M_exp"], gradient, keys, numbers, beta)
            return
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

    def _joined(self, modules: Mapping[str, TernaryScaleTensor]) -> list[list[str]]:
        """Names of those that move as one list of blocks, equal shapes together, as the workspace holds."""
        shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, module in modules.items():
            assert isinstance(module.capture, GradientCapture)
            tokens = module.capture.num_tokens
            factored = tokens is not None and self._may_stay_factored(module, tokens)
            alone = factored or isinstance(module, TernaryEmbeddingTable)
            if not alone and self._batch_size(module) > 1 and may_join(module, self.constants):
                shapes[module.out_features, module.in_features, module.group].append(name)
        batches: list[list[str]] = []
        room = 0
        for names in shapes.values():
            for name in names:
                weights = modules[name].numel()
                if weights > room:
                    batches.append([])
                    room = self.constants.workspace_weights
                batches[-1].append(name)
                room -= weights
        return batches

    def _update_joined(self, group: Mapping[str, TernaryScaleTensor]) -> None:
        modules = list(group.values())
        gradients = [m.capture.gradient() for m in modules if isinstance(m.capture, GradientCapture)]
        device = modules[0].T_packed.device
        flips = update_joined(
            [self._tensors(module) for module in modules],
            gradients,
            [module.group for module in modules],
            self._keys(list(group), device),
            self.numbers[device],
            self.constants,
        )
        self.flips |= dict(zip(group, flips, strict=True))

    def _groups(self, modules: Mapping[str, TernaryScaleTensor]) -> Iterable[tuple[list[str], int | None]]:
        """Names of equal shape, as many as the workspace holds; and how many tokens factors have."""
        shapes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, module in modules.items():
            assert isinstance(module.capture, GradientCapture)
            tokens = module.capture.num_tokens
            factored = tokens is not None and self._may_stay_factored(module, tokens)
            size = (module.out_features, module.in_features, module.group, module.T_packed.device)
            shapes[type(module), *size, tokens if factored else None].append(name)
        for (*_, tokens), names in shapes.items():
            count = self._batch_size(modules[names[0]])
            if tokens is not None:
                count = max(1, self._most_numbers // _numbers(modules[names[0]], tokens))
            for start in range(0, len(names), count):
                yield names[start : start + count], tokens

    def _batch_size(self, module: TernaryScaleTensor) -> int:
        """Matrices of this shape that the workspace holds, at least one."""
        rows, columns = module.out_features, module.in_features
        if self._moves_apart(module):
            workspace = self.constants.workspace_weights * WORKSPACE_BYTES_PER_WEIGHT
            return max(1, workspace // transient_bytes(rows, columns))
        return max(1, self.constants.workspace_weights // (rows * columns))

    def _moves_apart(self, module: TernaryScaleTensor) -> bool:
        """Whether a single matrix moves by `update_apart`; experts do not."""
        spectral = self.constants.rule == "spectral" and not self.constants.votes_on_scales
        single = isinstance(module.capture, GradientCapture) and not isinstance(module, TernaryEmbeddingTable)
        return spectral and single and uses_triton(module.T_packed)

    def _may_stay_factored(self, module: TernaryScaleTensor, tokens: int) -> bool:
        """Whether the direction of a gradient of so few tokens comes from two thin matrices."""
        few = 2 * tokens < min(module.out_features, module.in_features)
        return few and self._may_be_factored(module)

    def _may_be_factored(self, module: TernaryScaleTensor) -> bool:
        """Whether the direction of a gradient can come from two thin matrices."""
        constants = self.constants
        return (
            constants.rule in FACTORED_RULES
            and constants.momentum_bits == 0
            and not constants.votes_on_scales
            and module.E.shape[-1] == 1
            and not isinstance(module, TernaryEmbeddingTable)
        )

    def _update_group(self, group: Mapping[str, TernaryScaleTensor]) -> None:
        modules = list(group.values())
        device = modules[0].T_packed.device
        tensors = [self._tensors(module) for module in modules]
        parts = {key: _stack([t[key] for t in tensors]) for key in tensors[0]}
        keys, scale_keys = self._matrix_keys(list(group), device)
        batch = _batch(parts, modules[0].group, keys, scale_keys, self.numbers[device])
        captures = [m.capture for m in modules if isinstance(m.capture, GradientCapture)]
        gradient = _stack([capture.gradient().to(torch.float32) for capture in captures])
        by_row = isinstance(modules[0], TernaryEmbeddingTable)
        flips = self._update_formed(batch, gradient, by_row=by_row)
        for key, part in parts.items():
            if len(modules) > 1:
                torch._foreach_copy_([t[key] for t in tensors], list(part.unbind(0)))
        self.flips |= dict(zip(group, flips.unbind(0), strict=True))

    def _update_apart(self, group: Mapping[str, TernaryScaleTensor]) -> None:
        modules = list(group.values())
        device = modules[0].T_packed.device
        tensors = [self._tensors(module) for module in modules]
        batch = ApartBatch(
            packed=[t["T_packed"] for t in tensors],
            accumulator=[t["T_accum"] for t in tensors],
            momentum=[(t["M"], t["M_exp"]) for t in tensors if "M" in t],
            exponent=_stack([t["E"] for t in tensors]),
            group=modules[0].group,
            keys=self._keys(list(group), device),
            numbers=self.numbers[device],
        )
        captures = [m.capture for m in modules if isinstance(m.capture, GradientCapture)]
        gradients = [capture.gradient() for capture in captures]
        known = all(name in self.norms for name in group)
        norms = [self.norms[n] for n in group] if known else list(torch._foreach_norm(gradients, math.inf))
        active = (torch.stack(norms) != 0)[:, None, None] & self.ok.to(device)
        flips = update_apart(batch, gradients, active, self.constants)
        self.flips |= dict(zip(group, flips.unbind(0), strict=True))

    def _update_formed(self, batch: MatrixBatch, gradient: Tensor, *, by_row: bool = False) -> Tensor:
        active = gradient.any(dim=-1, keepdim=True) & self.ok.to(gradient.device)
        if not by_row:
            active = active.any(dim=-2, keepdim=True)
        return update_dense(batch, gradient, active, self.constants, by_row=by_row)

    # -- gradients that stay factors ------------------------------------------------------------------------

    @property
    def _most_numbers(self) -> int:
        """Numbers of factors that may be worked on at once; each takes about 10 bytes."""
        return 4 * self.constants.workspace_weights

    def _factored_tokens(self, module: TernaryScaleTensor, capture: ExpertCapture) -> int | None:
        """Tokens of experts whose gradients stay factors; None if they are formed.

        Where kernels run, a direction that is never stored costs little even if one expert has all tokens,
        and the host need not know how many each has.
        """
        tokens = capture.num_tokens
        if tokens is None or not self._may_be_factored(module):
            return None
        if uses_triton(module.T_packed):
            fits = _numbers(module, tokens) <= self._most_numbers and tokens <= MOST_FACTORED_TOKENS
        else:
            fits = self._may_stay_factored(module, tokens)
        return tokens if fits else None

    def _chunks(self, groups: Iterable["_Factored"]) -> Iterator[list["_Factored"]]:
        """Groups of equal numbers of tokens on a device, as many as the workspace holds."""
        together: list[_Factored] = []
        size = 0
        for group in sorted(groups, key=lambda group: (group.tokens, str(group.device))):
            fits = size + group.numbers <= self._most_numbers
            if together and not (fits and together[0].belongs_with(group)):
                yield together
                together, size = [], 0
            together.append(group)
            size += group.numbers
        if together:
            yield together

    def _update_factored(self, groups: list["_Factored"]) -> None:
        device = groups[0].device
        names = [name for group in groups for name in group.names]
        keys = self._keys(names, device).split([len(group.names) for group in groups])
        batches = [self._factored_batch(group, part) for group, part in zip(groups, keys, strict=True)]
        flips = update_factored(batches, self.ok.to(device), self.constants)
        self.flips |= dict(zip(names, flips.unbind(), strict=True))

    def _factored_batch(self, group: "_Factored", keys: Tensor) -> FactoredBatch:
        first = group.modules[0]
        tensors = [self._expert_tensors(module) for module in group.modules]
        owner = None
        if isinstance(first.capture, ExpertCapture):
            a, b, offsets = first.capture.sorted_rows()
            left, right = b.to(torch.float32)[None], a.to(torch.float32)[None]
            places = torch.arange(group.tokens, device=group.device)
            owner = torch.searchsorted(offsets, places, right=True)
            exponent = tensors[0]["E"].flatten(1)[owner.clamp(max=len(offsets) - 1)]
        else:
            captures = [m.capture for m in group.modules if isinstance(m.capture, GradientCapture)]
            factors = [capture.factors() for capture in captures]
            left = _stack([b for _, b in factors]).to(torch.float32)
            right = _stack([a for a, _ in factors]).to(torch.float32)
            exponent = _stack([t["E"].flatten() for t in tensors])
            offsets = torch.full((1,), group.tokens, dtype=torch.int32, device=group.device)
        return FactoredBatch(
            packed=[t["T_packed"] for t in tensors],
            accumulator=[t["T_accum"] for t in tensors],
            exponent=exponent,
            left=left,
            right=right,
            offsets=offsets,
            keys=keys,
            owner=owner,
            numbers=self.numbers[group.device],
        )

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
        if device.type == "cuda" and capture.experts <= size:
            # All at once, those without tokens as zeros: no question to the device.
            gradient = capture.product().to(torch.float32)
            batch = self._of_experts(name, module, slice(0, capture.experts))
            return self._update_formed(batch, gradient).sum()
        return self._update_busy_experts(name, module, activations, gradients, offsets)

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
                factors = FactoredBatch(
                    packed=[batch.packed],
                    accumulator=[batch.accumulator],
                    exponent=batch.exponent.flatten(1),
                    left=b.to(torch.float32)[None],
                    right=a.to(torch.float32)[None],
                    offsets=torch.full((1,), last - first, dtype=torch.int32, device=device),
                    keys=batch.keys,
                    owner=None,
                    numbers=batch.numbers,
                )
                total += update_factored([factors], self.ok.to(device), self.constants)[0]
            else:
                gradient = (b.t() @ a.to(b.dtype)).to(torch.float32)
                total += self._update_formed(batch, gradient[None]).sum()
        return total

    def _of_experts(self, name: str, module: TernaryScaleTensor, experts: slice) -> MatrixBatch:
        """The matrices of neighbouring experts with their state, as views."""
        tensors = self._expert_tensors(module)
        numbers = torch.arange(experts.start, experts.stop, device=module.T_packed.device)
        return self._expert_batch(name, module, {k: t[experts] for k, t in tensors.items()}, numbers)

    def _expert_tensors(self, module: TernaryScaleTensor) -> dict[str, Tensor]:
        """Weights and state by key, the leading dimensions as one, of size 1 for a single matrix."""
        return {
            key: tensor[None] if tensor.dim() == 2 else tensor.flatten(0, -3)
            for key, tensor in self._tensors(module).items()
        }

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
