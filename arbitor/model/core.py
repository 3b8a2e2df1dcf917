"""The iterated core: experts and motif messages, applied to each position until it halts.

A recurrence over one state a position whose input comes in again at each iteration (Geiping et al. 2025,
"Scaling up Test-Time Compute with Latent Reasoning", section 3), with adaptive computation time (Graves 2016,
section 2). Nothing in it looks at another position.

Shape letters: B batch, N positions, D dim, E experts, M rows (all positions of the batch), L rows that have
not halted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.ffn import FeedForward
from arbitor.model.graph import MotifGraph, Neighbours
from arbitor.model.moe import MoE, Permute
from arbitor.model.precision import sigmoid
from arbitor.ops.rows import write_rows
from arbitor.ternary import Int8Vector, TernaryLinear
from arbitor.ternary.first_rows import on_first_rows

DECAY_FRACTION_BITS = 5
DECAY_CENTRE = 3.0
# At twice the gain, or with biases of up to 6, nearly all positions of a small model halted after the first
# iteration within 50 steps, from where no gradient leads back; its loss was the same.
HALT_FRACTION_BITS = 5
HALT_GAIN = 0.5
HALT_START = 1.0  # sigmoid(1) = 0.73: most positions pass 0.99 in their second iteration


class CoreOutput(NamedTuple):
    """What the core returns.

    Attributes:
        state: [B, N, D].
        ponder: fp32 scalar, mean over the positions of iterations + remainder; None if none can halt.
        metrics: scalars on the device, without gradient.
    """

    state: Tensor
    ponder: Tensor | None
    metrics: dict[str, Tensor]


class StateDecay(Int8Vector):
    """a = 1 - 2^-e in s <- a s + (1 - a) h, one for each dimension, with e = 3 + value in (0.03, 5.97).

    Whatever training does to the integers, 0 < a < 1: the map is stable, and linear and time-invariant.
    """

    def __init__(self, dim: int, device: torch.device | None = None) -> None:
        super().__init__(dim, fraction_bits=DECAY_FRACTION_BITS, device=device)

    def forward(self) -> Tensor:
        """a as fp32 [dim]."""
        return 1 - torch.exp2(-(DECAY_CENTRE + super().forward()))


class HaltingUnit(nn.Module):
    """The probability that a position halts: sigmoid(linear(s) / 2 + bias)."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = TernaryLinear(config.dim, 1, tscale=config.tscale, device=device)
        self.bias = Int8Vector(1, fraction_bits=HALT_FRACTION_BITS, value=HALT_START, device=device)

    def forward(self, s_LD: Tensor, bias: Tensor, count: Tensor | None = None) -> Tensor:
        """[L, 1], at least fp32; `bias` is the value of `self.bias`, which all iterations share.

        With `count`, int32 [1], only those of the first rows are wanted; see `on_first_rows`.
        """
        with torch.autocast(s_LD.device.type, enabled=False):
            return sigmoid(HALT_GAIN * on_first_rows(self.linear, s_LD, count) + bias)


class _Select(torch.autograd.Function):
    """Some rows, each once at most: x [L, ...] -> x[index]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x[index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # A copy, where autograd, which does not know that no row comes twice, would add.
        (index,) = ctx.saved_tensors
        return write_rows(dy.new_zeros(ctx.shape), index, dy), None


class _WeightedSum(torch.autograd.Function):
    """Sum over iterations of weight * state, each for the rows that took part.

    The arguments are those of the first iteration, of all rows: weight [M, 1], state [M, D]; then, for each
    later one, weight [L, 1], state [L, D] and the int64 [L] numbers of its rows.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, state: Tensor, *later: Tensor) -> Tensor:
        ctx.save_for_backward(weight, state, *later)
        total = weight * state
        for w, s, index in _threes(later):
            write_rows(total, index, total[index] + w * s)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, state, *later = ctx.saved_tensors
        gradients: list[Tensor | None] = [(dy * state).sum(dim=-1, keepdim=True), weight * dy]
        for w, s, index in _threes(later):
            part = dy[index]
            gradients += [(part * s).sum(dim=-1, keepdim=True), w * part, None]
        return tuple(gradients)


def _marked_first(mark_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which marked rows come first, and all keep theirs otherwise.

    Args:
        mark_M: bool [M].

    Returns:
        int64 [M], the row at each new place, and int64 [M], the new place of each row; and int32 [1], how
        many are marked.
    """
    upto_M = mark_M.cumsum(dim=0)
    place_M = torch.arange(len(mark_M), device=mark_M.device)
    inverse_M = torch.where(mark_M, upto_M - 1, upto_M[-1] + place_M - upto_M)
    order_M = write_rows(torch.empty_like(place_M), inverse_M, place_M)
    return order_M, inverse_M, upto_M[-1:].to(torch.int32)


def _threes(tensors: Any) -> Any:
    return zip(tensors[0::3], tensors[1::3], tensors[2::3], strict=True)


class MoEGraph(nn.Module):
    """s_0 = h; s <- a s + (1 - a) h; s += experts(s); s += messages(s); a position halts on its own.

    With p_n the halting probability after iteration n, a position stops at the first n at which the sum of
    p_1 to p_n reaches `halt_threshold`, or at the last one allowed. Its result is the sum of p_n s_n, where
    the last state has the remainder R = 1 - (the sum of the earlier p) instead of its p. The ponder cost of a
    position is n + R. The rows of those that have halted are left out of what follows.

    Args:
        config: `max_moe_iters`, `halt_threshold`; experts (or the feed-forward part in their place) and graph
            are made if it asks for them.
        code_dim: width of a motif's code vector; needed for a graph.
        device: where to make it.

    In training on a GPU they stay, so that no iteration waits for how many are left and a step can be
    replayed from a graph: those that go on are moved to the front and counted on the device, products are of
    them alone, and the others weigh 0. Results are the same up to the rounding of gradients.

    Attributes:
        max_iters: most iterations of a position; may be lowered on a model that is there.
        masks: True masks rows that have halted, False leaves them out; None does as is said above.
    """

    def __init__(
        self, config: ModelConfig, code_dim: int | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.max_iters = config.max_moe_iters
        self.threshold = config.halt_threshold
        self.masks: bool | None = None
        self.moe = MoE(config, device) if config.num_experts else None
        self.ffn = FeedForward(config, device, config.core_ffn_dim) if config.core_ffn_dim else None
        self.graph = None
        if config.graph_edges:
            assert code_dim is not None, "a graph needs the code vectors of a VQ bridge"
            self.graph = MotifGraph(config, code_dim, device)
        if config.max_moe_iters > 1:
            self.decay = StateDecay(config.dim, device)
            self.halting = HaltingUnit(config, device)

    def forward(
        self,
        h_BND: Tensor,
        motif_BN: Tensor | None = None,
        code_vectors: Callable[[Tensor], Tensor] | None = None,
    ) -> CoreOutput:
        """The state of every position when it halts.

        Where rows are left out, asks the device once an iteration (but the last) how many there are.

        Args:
            h_BND: residual stream.
            motif_BN: int64, the positions' motifs; for a graph only.
            code_vectors: code vectors of motifs; for a graph only.
        """
        neighbours = None
        if self.graph is not None:
            assert motif_BN is not None
            assert code_vectors is not None
            neighbours = self.graph.look_up(motif_BN, code_vectors)
        h_MD = h_BND.flatten(0, 1)
        if self.max_iters == 1:
            s_MD, load_E = self._update(h_MD, neighbours)
            ponder, iterations = None, torch.ones((), device=h_MD.device)
        elif self._masks(h_MD):
            s_MD, load_E, ponder, iterations = self._masked_until_halted(h_MD, neighbours)
        else:
            s_MD, load_E, ponder, iterations = self._until_halted(h_MD, neighbours)
        metrics = {"mean_iterations": iterations}
        if load_E is not None:
            metrics["expert_load"] = load_E.max() * len(load_E) / load_E.sum()
        if self.graph is not None and neighbours is not None:
            metrics |= self.graph.metrics(neighbours)
        return CoreOutput(s_MD.view(h_BND.shape), ponder, metrics)

    def _masks(self, h_MD: Tensor) -> bool:
        if self.masks is not None:
            return self.masks
        return h_MD.is_cuda and self.training and torch.is_grad_enabled()

    def _update(
        self, s_LD: Tensor, neighbours: Neighbours | None, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One iteration, of the first `count` rows, without the injection of h; and the experts' load."""
        load_E = None
        counted = () if count is None else (count,)
        if self.moe is not None:
            y_LD, load_E = self.moe(s_LD, *counted)
            s_LD = s_LD + y_LD
        elif self.ffn is not None:
            s_LD = s_LD + self.ffn(s_LD, *counted)
        if self.graph is not None and neighbours is not None:
            s_LD = s_LD + self.graph.messages(s_LD, neighbours, count)
        return s_LD, load_E

    def _halt(
        self, s_LD: Tensor, spent_L1: Tensor, halt_bias: Tensor, *, last: bool, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weight of a state, the remainder if its position halts; whether it does; the new sum of p."""
        rest_L1 = 1 - spent_L1
        if last:
            return rest_L1, torch.ones_like(rest_L1, dtype=torch.bool), spent_L1
        p_L1 = self.halting(s_LD, halt_bias, count)
        halts_L1 = spent_L1 + p_L1 >= self.threshold
        return torch.where(halts_L1, rest_L1, p_L1), halts_L1, spent_L1 + p_L1

    def _until_halted(
        self, h_MD: Tensor, neighbours: Neighbours | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Result [M, D], the experts' load, the ponder cost, and the mean number of iterations."""
        decay_D, halt_bias = self.decay(), self.halting.bias()
        h_LD = s_LD = h_MD
        spent_L1 = h_MD.new_zeros((len(h_MD), 1))
        row_L = torch.arange(len(h_MD), device=h_MD.device)
        terms: list[Tensor] = []
        load_E: Tensor | None = None
        remainder = h_MD.new_zeros((), dtype=torch.float32)
        num_uses = 0
        for iteration in range(1, self.max_iters + 1):
            if iteration > 1:  # before, s = h, which the injection leaves as it is
                s_LD = h_LD + decay_D * (s_LD - h_LD)
            s_LD, load = self._update(s_LD, neighbours)
            load_E = load if load_E is None or load is None else load_E + load
            num_uses += len(s_LD)
            last = iteration == self.max_iters
            weight_L1, halts_L1, spent_L1 = self._halt(s_LD, spent_L1, halt_bias, last=last)
            remainder = remainder + torch.where(halts_L1, weight_L1, 0).sum(dtype=torch.float32)
            terms += [weight_L1, s_LD] if iteration == 1 else [weight_L1, s_LD, row_L]
            if iteration == self.max_iters:
                break
            live = (~halts_L1[:, 0]).nonzero()[:, 0]
            if not len(live):
                break
            if len(live) < len(row_L):
                s_LD, h_LD, spent_L1 = (_Select.apply(t, live) for t in (s_LD, h_LD, spent_L1))
                row_L = row_L[live]
                neighbours = None if neighbours is None else neighbours.rows(live)
        iterations = torch.full((), num_uses / len(h_MD), device=h_MD.device)
        return _WeightedSum.apply(*terms), load_E, iterations + remainder / len(h_MD), iterations

    def _masked_until_halted(
        self, h_MD: Tensor, neighbours: Neighbours | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """As `_until_halted`, with all rows in every iteration and no question to the device.

        Rows that go on stand before those that have halted, in their order.
        """
        decay_D, halt_bias = self.decay(), self.halting.bias()
        s_MD = h_MD
        spent_M1 = h_MD.new_zeros((len(h_MD), 1))
        place_M = row_M = torch.arange(len(h_MD), device=h_MD.device)
        live_M1 = torch.ones_like(spent_M1, dtype=torch.bool)
        count: Tensor | None = None
        terms: list[Tensor] = []
        load_E: Tensor | None = None
        remainder = h_MD.new_zeros((), dtype=torch.float32)
        num_uses = torch.full((1,), len(h_MD), dtype=torch.int32, device=h_MD.device)
        for iteration in range(1, self.max_iters + 1):
            if iteration > 1:
                s_MD = h_MD + decay_D * (s_MD - h_MD)
            s_MD, load = self._update(s_MD, neighbours, count)
            load_E = load if load_E is None or load is None else load_E + load
            last = iteration == self.max_iters
            weight_M1, halts_M1, spent_M1 = self._halt(s_MD, spent_M1, halt_bias, last=last, count=count)
            weight_M1 = torch.where(live_M1, weight_M1, 0)
            remainder = remainder + torch.where(halts_M1, weight_M1, 0).sum(dtype=torch.float32)
            terms += [weight_M1, s_MD] if iteration == 1 else [weight_M1, s_MD, row_M]
            if last:
                break
            order_M, inverse_M, count = _marked_first((live_M1 & ~halts_M1)[:, 0])
            num_uses = num_uses + count
            s_MD, h_MD, spent_M1 = (Permute.apply(t, order_M, inverse_M) for t in (s_MD, h_MD, spent_M1))
            row_M = row_M[order_M]
            neighbours = None if neighbours is None else neighbours.permuted(order_M, inverse_M)
            live_M1 = (place_M < count)[:, None]
        iterations = num_uses[0].to(torch.float32) / len(h_MD)
        return _WeightedSum.apply(*terms), load_E, iterations + remainder / len(h_MD), iterations
