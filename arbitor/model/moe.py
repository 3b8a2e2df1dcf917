"""Mixture of experts: every position goes through a few experts of many, and through one that all share.

The routing is that of DeepSeek-V3 (DeepSeek-AI 2024, section 2.1.2): sigmoid affinities, gates normalised
over the chosen experts, and loads kept equal by a bias that counts for the choice only, without a balance
loss.

Shape letters: M rows (positions of any texts), D dim, E experts, K experts that a row uses, R = M K uses.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.ffn import FeedForward, after_squared_relu
from arbitor.model.precision import sigmoid
from arbitor.ternary import IntegerCounters, TernaryExperts, TernaryLinear
from arbitor.ternary.counters import RandomBits
from arbitor.ternary.first_rows import on_first_rows

BIAS_FRACTION_BITS = 10  # a step moves a bias by 2^-10, which is about the 0.001 of the source
MAX_BIAS = (1 << 15) - 1


class BalanceBias(IntegerCounters):
    """What is added to an expert's affinity when experts are chosen; it grows while the expert is idle.

    Attributes:
        bias: int16 buffer [E], in units of 2^-10.

    Args:
        num_experts: E.
        device: where to make it.
    """

    bias: Tensor

    def __init__(self, num_experts: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.int16, device=device))
        self._noted: list[Tensor] = []

    def forward(self, affinity_ME: Tensor) -> Tensor:
        """Affinities plus bias, in the affinities' dtype."""
        return affinity_ME + self.bias.to(affinity_ME.dtype) * 2.0**-BIAS_FRACTION_BITS

    def note(self, load_E: Tensor) -> None:
        """Remember how many rows each expert got in a use, int [E], for the next step."""
        if self.noting:
            self._noted.append(load_E)

    def advance(self, ok: Tensor, random_bits: RandomBits) -> None:
        """One unit up for experts whose load since the last step was below the mean, one down if above."""
        if not self._noted:
            return
        load_E = torch.stack(self._noted).sum(dim=0, dtype=torch.int64)
        direction_E = torch.sign(load_E.sum() - load_E * len(load_E))
        moved_E = (self.bias + direction_E).clamp_(-MAX_BIAS, MAX_BIAS).to(torch.int16)
        self.bias.copy_(torch.where(ok, moved_E, self.bias))
        self.forget()

    def forget(self) -> None:
        """Drop the noted loads."""
        self._noted = []

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        given = state_dict.get(prefix + "bias")
        if isinstance(given, Tensor) and given.dtype != torch.int16:
            # Copying would round floats to integers without a word.
            error_msgs.append(f"{prefix}bias is {given.dtype}, expected torch.int16")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class Routing(NamedTuple):
    """Which experts the rows use, and in what order the uses lie when they are sorted by expert.

    Attributes:
        gate: float [M, K], weights of the chosen experts; they sum to 1.
        order: int64 [R], sorted position -> use (row * K + choice).
        place: int64 [R], use -> sorted position.
        offsets: int32 [E], the end of each expert's sorted uses; what is behind the last one's uses none.
    """

    gate: Tensor
    order: Tensor
    place: Tensor
    offsets: Tensor

    @property
    def load(self) -> Tensor:
        """int32 [E], uses of each expert."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))


class Router(nn.Module):
    """Chooses the K experts of largest biased affinity, the lowest number first among equals.

    Args:
        config: `num_experts` E, `num_active_experts` K.
        device: where to make it.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.num_active = config.num_active_experts
        self.affinity = TernaryLinear(config.dim, config.num_experts, tscale=config.tscale, device=device)
        self.balance = BalanceBias(config.num_experts, device)

    def forward(self, s_MD: Tensor, count: Tensor | None = None) -> Routing:
        """The routing of some rows; notes the loads for the next step.

        Args:
            s_MD: state of M rows.
            count: int32 [1], how many of the first rows use experts; None are all. The uses of the others
                come behind the last expert's.
        """
        # In bf16, affinities of different experts would often be equal.
        with torch.autocast(s_MD.device.type, enabled=False):
            affinity_ME = sigmoid(on_first_rows(self.affinity, s_MD, count))
        with torch.no_grad():
            biased_ME = self.balance(affinity_ME)
            # A stable sort keeps equals in order, which topk does not promise.
            chosen_MK = biased_ME.sort(dim=-1, descending=True, stable=True).indices[:, : self.num_active]
            if count is not None:
                uses_M = torch.arange(len(s_MD), device=s_MD.device) < count
                chosen_MK = torch.where(uses_M[:, None], chosen_MK, affinity_ME.shape[-1])
            expert_R, order_R = chosen_MK.flatten().sort(stable=True)
            experts_E = torch.arange(affinity_ME.shape[-1], device=s_MD.device)
            offsets_E = torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)
        chosen_affinity_MK = affinity_ME.gather(-1, chosen_MK.clamp(max=affinity_ME.shape[-1] - 1))
        total_M1 = chosen_affinity_MK.sum(dim=-1, keepdim=True)
        gate_MK = chosen_affinity_MK / total_M1.clamp_min(torch.finfo(total_M1.dtype).tiny)
        routing = Routing(gate_MK, order_R, order_R.argsort(), offsets_E)
        self.balance.note(routing.load)
        return routing


class _Dispatch(torch.autograd.Function):
    """Rows [M, D] -> their uses [R, D], sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_R: Tensor, place_R: Tensor) -> Tensor:
        ctx.save_for_backward(place_R)
        ctx.rows = len(x_MD)
        return x_MD[order_R // (len(order_R) // len(x_MD))]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None]:
        # A gather and a sum over the choices, where autograd would add at equal indices in any order.
        (place_R,) = ctx.saved_tensors
        return dy_RD[place_R].unflatten(0, (ctx.rows, -1)).sum(dim=1), None, None


class Permute(torch.autograd.Function):
    """y = x[index] for a permutation of the rows; `inverse` is the one that leads back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """x[index]."""
        ctx.save_for_backward(inverse)
        return x[index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """dy[inverse]."""
        (inverse,) = ctx.saved_tensors
        return dy[inverse], None, None


class MoE(nn.Module):
    """shared(s) + sum over the chosen experts of gate * down_e(relu(up_e(s))^2).

    A row's result depends on that row alone: there is no capacity that others could use up.

    Args:
        config: `num_experts`, `num_active_experts`, `expert_dim`.
        device: where to make it.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        experts, dim, hidden, tscale = config.num_experts, config.dim, config.expert_dim, config.tscale
        self.router = Router(config, device)
        self.up = TernaryExperts(experts, dim, hidden, tscale=tscale, device=device)
        self.down = TernaryExperts(experts, hidden, dim, tscale=tscale, device=device)
        self.shared = FeedForward(config, device, hidden)

    def forward(self, s_MD: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the experts add to the state.

        Args:
            s_MD: state of M rows.
            count: int32 [1], how many of the first rows' results are wanted; None are all. The others are 0
                and have no gradient; see `on_first_rows`.

        Returns:
            [M, D], and the load of every expert, int32 [E].
        """
        routing = self.router(s_MD, count)
        s_RD = _Dispatch.apply(s_MD, routing.order, routing.place)
        y_RD = after_squared_relu(self.down, self.up(s_RD, routing.offsets), routing.offsets)
        y_MKD = Permute.apply(y_RD, routing.place, routing.order).unflatten(0, routing.gate.shape)
        gated_MKD = routing.gate[..., None] * y_MKD
        return self.shared(s_MD, count) + gated_MKD.sum(dim=1), routing.load
