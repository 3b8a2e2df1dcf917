"""Causal softmax attention with the weights of all positions at once, and its gradients in closed form.

Shape letters: B batch, N positions, H heads, K dims of a query or key, V value dims of a head,
L = N in whole blocks.
"""

import math

import torch
from torch import Tensor

from arbitor.ops.activations import compute_dtype

BLOCK = 64  # positions, a multiple of the kernels' blocks of queries


def lse_shape(query_BNHK: Tensor) -> tuple[int, int, int]:
    """B, H and L, which is N in whole blocks of queries."""
    B, N, H, _ = query_BNHK.shape
    return B, H, -(-N // BLOCK) * BLOCK


def forward(query_BNHK: Tensor, key_BNHK: Tensor, value_BNHV: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and what its backward needs.

    Returns:
        [B, N, H, V] in the dtype of the query, and the binary logarithm of the sum of a query's exponentials,
        at least fp32 [B, H, L], infinite from N on.
    """
    score_BHNN = _scores(_wide(query_BNHK), _wide(key_BNHK))
    lse_BHN = score_BHNN.logsumexp(dim=-1)
    weight_BHNN = (score_BHNN - lse_BHN[..., None]).exp()
    out_BNHV = torch.einsum("bhnm,bmhv->bnhv", weight_BHNN, _wide(value_BNHV))
    lse_BHL = lse_BHN.new_full(lse_shape(query_BNHK), torch.inf)
    lse_BHL[..., : lse_BHN.shape[2]] = lse_BHN * math.log2(math.e)
    return out_BNHV.to(query_BNHK.dtype).contiguous(), lse_BHL


def backward(
    dout_BNHV: Tensor,
    query_BNHK: Tensor,
    key_BNHK: Tensor,
    value_BNHV: Tensor,
    out_BNHV: Tensor,
    lse_BHL: Tensor,
    dvalue_BNHV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys; that of values is written into `dvalue_BNHV`, a view of any strides."""
    query, key, value, out, dout = map(_wide, (query_BNHK, key_BNHK, value_BNHV, out_BNHV, dout_BNHV))
    lse_BHN = lse_BHL[..., : query.shape[1]] / math.log2(math.e)
    weight_BHNN = (_scores(query, key) - lse_BHN[..., None]).exp()
    dvalue_BNHV.copy_(torch.einsum("bhnm,bnhv->bmhv", weight_BHNN, dout))
    dweight_BHNN = torch.einsum("bnhv,bmhv->bhnm", dout, value)
    delta_BHN = (dout * out).sum(dim=-1).transpose(1, 2)
    dscore_BHNN = weight_BHNN * (dweight_BHNN - delta_BHN[..., None]) * query.shape[-1] ** -0.5
    dquery = torch.einsum("bhnm,bmhk->bnhk", dscore_BHNN, key)
    dkey = torch.einsum("bhnm,bnhk->bmhk", dscore_BHNN, query)
    return dquery.to(query_BNHK.dtype).contiguous(), dkey.to(key_BNHK.dtype)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    N, K = query.shape[1], query.shape[3]
    score_BHNN = torch.einsum("bnhk,bmhk->bhnm", query, key) * K**-0.5
    hidden_NN = torch.ones((N, N), dtype=torch.bool, device=query.device).triu_(1)
    return score_BHNN.masked_fill_(hidden_NN, -torch.inf)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))
