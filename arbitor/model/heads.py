"""What turns the residual stream into predictions, one head a modality.

Shape letters: B batch, T times, Q codes of a time, V values of a code, D dim, M rows.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.norm import rms_norm
from arbitor.ternary import Int8Embedding, TernaryLinear

NOT_COUNTED = -100  # a target without a loss


class ByteHead(Int8Embedding):
    """Logits of the id that follows: `logits(h)`, float [..., D] -> [..., vocab_size].

    Attributes:
        in_features, out_features: D and vocab_size, as a linear has them.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__(config.vocab_size, config.dim, kind="head", device=device)
        self.in_features, self.out_features = config.dim, config.vocab_size

    def forward(self, x: Tensor, quantize: bool = True) -> Tensor:
        """The same as `logits`: a head is a linear, its rows are not looked up."""
        return self.logits(x, quantize)


class TalkerHead(nn.Module):
    """Predicts the Q codes of a time in their order, each from the residual stream and the codes before it.

    State q is rms_norm(rms_norm(h) + the vectors of codes 0...q-1), then one feed-forward part that all q
    share, and a table of its own. (Défossez et al. 2024, "Moshi", section 3.4.1, predict the codes of a time
    by a small transformer over them; of four codes a sum does.) The first code has one value more, `end`: the
    sound is over.

    Attributes:
        end: V.

    Args:
        config: `dim`, `audio_codes`, `audio_trits`.
        device: where to make it.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.num_codes, self.end = config.audio_codes, 3**config.audio_trits
        dim, tscale = config.dim, config.tscale
        self.codes = Int8Embedding(max(1, (self.num_codes - 1) * self.end), dim, device=device)
        self.up = TernaryLinear(dim, 2 * dim, tscale=tscale, device=device)
        self.down = TernaryLinear(2 * dim, dim, tscale=tscale, device=device)
        self.tables = nn.ModuleList(
            Int8Embedding(self.end + (q == 0), dim, kind="head", device=device) for q in range(self.num_codes)
        )

    def forward(self, h_BTD: Tensor, codes_BTQ: Tensor) -> Tensor:
        """Residual stream and the right codes -> logits fp32 [B, T, Q, V + 1]; -inf for `end` where q > 0."""
        state_BTQD = self._hidden(self._states(h_BTD, codes_BTQ))
        with torch.autocast(h_BTD.device.type, enabled=False):
            logits = [self._logits(state_BTQD[:, :, q].float(), q) for q in range(self.num_codes)]
        return torch.stack(logits, dim=2)

    def loss(self, h_BTD: Tensor, codes_BSQ: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of codes and of the end behind them, and their mean cross entropy.

        Args:
            h_BTD: what each time is predicted from, T = S + 1.
            codes_BSQ: int64, the right codes.
            count_B: int64, how many times of them count; time `count` is the end.

        Returns:
            fp32 [B, T, Q, V + 1], and nats per code, fp32 scalar.
        """
        codes_BTQ = F.pad(codes_BSQ, (0, 0, 0, 1))
        logits_BTQV = self(h_BTD, codes_BTQ)
        time_T1 = torch.arange(codes_BTQ.shape[1], device=count_B.device)[:, None]
        target_BTQ = codes_BTQ.masked_fill(time_T1 >= count_B[:, None, None], NOT_COUNTED)
        is_end_BT = time_T1[:, 0] == count_B[:, None]
        target_BTQ[..., 0] = target_BTQ[..., 0].masked_fill(is_end_BT, self.end)
        loss = F.cross_entropy(logits_BTQV.flatten(0, 2), target_BTQ.flatten(), ignore_index=NOT_COUNTED)
        return logits_BTQV, loss

    @torch.no_grad()
    def draw(
        self, h_BD: Tensor, temperature: float, top_k: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The codes of one time.

        Args:
            h_BD: residual stream of the position ahead of it.
            temperature: 0 takes the likeliest value always.
            top_k: draw among the k likeliest only; 0 is off.
            generator: of the draws, on the CPU.

        Returns:
            int64 [B, Q], and bool [B]: the sound was over, its codes are 0.
        """
        codes_BQ = torch.zeros((len(h_BD), self.num_codes), dtype=torch.int64, device=h_BD.device)
        over_B = torch.zeros(len(h_BD), dtype=torch.bool, device=h_BD.device)
        for q in range(self.num_codes):
            state_BD = self._hidden(self._states(h_BD[:, None], codes_BQ[:, None])[:, 0, q])
            logits_BV = self._logits(state_BD.float(), q)
            value_B = _drawn(logits_BV, temperature, top_k, generator)
            if q == 0:
                over_B = value_B == self.end
            codes_BQ[:, q] = value_B.masked_fill(over_B, 0)
        return codes_BQ, over_B

    def _states(self, h_BTD: Tensor, codes_BTQ: Tensor) -> Tensor:
        """[B, T, Q, D]: what each code is predicted from."""
        sums_BTD = [rms_norm(h_BTD.float())]
        rows_Q = torch.arange(self.num_codes - 1, device=codes_BTQ.device) * self.end
        # Not torch.cumsum, which CUDA has in no deterministic form.
        for vector_BTD in self.codes(codes_BTQ[..., :-1] + rows_Q).unbind(dim=2):
            sums_BTD.append(sums_BTD[-1] + vector_BTD)
        return rms_norm(torch.stack(sums_BTD, dim=2))

    def _hidden(self, state: Tensor) -> Tensor:
        return state + self.down(F.relu(self.up(state)).square())

    def _logits(self, state: Tensor, q: int) -> Tensor:
        """[..., D] -> fp32 [..., V + 1]."""
        logits = cast(Int8Embedding, self.tables[q]).logits(state).float()
        return logits if q == 0 else F.pad(logits, (0, 1), value=-math.inf)


def _drawn(logits_BV: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """int64 [B]."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    if top_k:
        smallest_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -math.inf)
    share_BV = torch.softmax(logits_BV.cpu().double() / temperature, dim=-1)
    return torch.multinomial(share_BV, 1, generator=generator)[:, 0].to(logits_BV.device)
