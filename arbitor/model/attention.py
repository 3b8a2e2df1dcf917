"""Multi-head latent attention with a decoupled rotary key (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).

Shape letters: B batch, N new positions, M positions that they see, H heads, D dim, C latent, P plain (not
rotary) dims of a head, R rotary dims, K = P + R dims of a query or key, V value dims of a head, U = P + V.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbitor.config import ModelConfig
from arbitor.model.ledger import LayerLedger
from arbitor.model.rotary import Rotation
from arbitor.model.short_attention import is_short, short_attention
from arbitor.ops.attention import attend, can_attend
from arbitor.ops.head_norm import keys_and_values, norm_and_rotate, split_latent
from arbitor.ternary import TernaryLinear
from arbitor.ternary.stream import Stream, read_stream


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from one latent a position, which is all that is kept.

    A head's query has a plain and a rotary part, normalised together, so that the query decides how much
    position counts. Its key has a plain part of its own, from the latent, and the rotary part that all heads
    share; each is normalised by itself. With `config.attention_window` above 0, a position sees that many
    positions, its own included.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.rope_dim = config.rope_dim
        self.value_dim = config.value_dim
        self.latent_dim = config.kv_latent_dim
        self.window = config.attention_window
        self.query = TernaryLinear(
            config.dim,
            config.num_heads * (config.head_dim + config.rope_dim),
            tscale=config.tscale,
            device=device,
        )
        self.kv_down = TernaryLinear(
            config.dim, config.kv_latent_dim + config.rope_dim, tscale=config.tscale, device=device
        )
        self.kv_up = TernaryLinear(
            config.kv_latent_dim,
            config.num_heads * (config.head_dim + config.value_dim),
            tscale=config.tscale,
            device=device,
        )
        self.out = TernaryLinear(
            config.num_heads * config.value_dim, config.dim, tscale=config.tscale, device=device
        )

    def forward(self, h_BND: Tensor, rotation: Rotation, ledger: LayerLedger | None = None) -> Tensor:
        """What attention adds to the residual stream [B, N, D]; see `update`."""
        return self.update(h_BND, rotation, ledger)[1]

    def update(
        self, stream: Tensor | Stream, rotation: Rotation, ledger: LayerLedger | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, to go on with, and what attention adds to it.

        Args:
            stream: residual stream [B, N, D] of the new positions.
            rotation: their angles, [N, R/2].
            ledger: latents and rotary keys of the positions before them; the new ones are appended.
                Without one, the new positions are the whole context.

        Returns:
            [B, N, D] twice.
        """
        B, N, _ = stream.shape
        h_BND, query_BNE, down_BNE = read_stream(stream, self.query, self.kv_down)
        query_BNHK = query_BNE.unflatten(-1, (self.num_heads, -1))
        query_BNHK = norm_and_rotate(query_BNHK, *rotation)
        latent_BMC, shared_key_BMR = split_latent(down_BNE, *rotation, self.latent_dim)
        if ledger is not None:
            latent_BMC, shared_key_BMR = ledger.append(latent_BMC, shared_key_BMR)
            if self.window:
                visible = N + self.window - 1
                latent_BMC, shared_key_BMR = latent_BMC[:, -visible:], shared_key_BMR[:, -visible:]
        up_BMHU = self.kv_up(latent_BMC).unflatten(-1, (self.num_heads, -1))
        whole = self.window == 0 or self.window >= N
        if ledger is None and whole and can_attend(query_BNHK, up_BMHU, shared_key_BMR):
            y_BNHV = attend(query_BNHK, up_BMHU, shared_key_BMR)
        else:
            key_BMHK, value_BMHV = keys_and_values(up_BMHU, shared_key_BMR, self.head_dim)
            heads = query_BNHK.transpose(1, 2), key_BMHK.transpose(1, 2), value_BMHV.transpose(1, 2)
            y_BNHV = self._attend(*heads).transpose(1, 2)
        return h_BND, self.out(y_BNHV.reshape(B, N, -1))

    def _attend(self, query_BHNK: Tensor, key_BHMK: Tensor, value_BHMV: Tensor) -> Tensor:
        """Softmax attention [B, H, N, V]; the N queries are the last N of the M positions."""
        N, M = query_BHNK.shape[2], key_BHMK.shape[2]
        K, V = query_BHNK.shape[3], value_BHMV.shape[3]
        # The fused kernels of all devices want K = V; zeros change neither scores nor the values kept.
        if K < V:
            query_BHNK, key_BHMK = F.pad(query_BHNK, (0, V - K)), F.pad(key_BHMK, (0, V - K))
        elif V < K:
            value_BHMV = F.pad(value_BHMV, (0, K - V))
        whole = self.window == 0 or self.window >= M
        causal = whole and N == M
        if causal and is_short(query_BHNK, key_BHMK, value_BHMV):
            y_BHNV = short_attention(query_BHNK, key_BHMK, value_BHMV, K**-0.5)
            return y_BHNV if K <= V else y_BHNV[..., :V]  # a slice costs a pass over its gradient
        mask_NM = None
        if not causal and N > 1:
            distance_NM = self._distance(N, M, query_BHNK.device)
            mask_NM = distance_NM >= 0
            if not whole:
                mask_NM &= distance_NM < self.window
        y_BHNV = F.scaled_dot_product_attention(
            query_BHNK, key_BHMK, value_BHMV, attn_mask=mask_NM, is_causal=causal, scale=K**-0.5
        )
        return y_BHNV if K <= V else y_BHNV[..., :V]

    @staticmethod
    def _distance(N: int, M: int, device: torch.device) -> Tensor:
        """int64 [N, M]: how many positions key m lies behind query n."""
        positions_M = torch.arange(M, device=device)
        return positions_M[M - N :, None] - positions_M
