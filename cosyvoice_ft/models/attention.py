"""Attention: who may look at whom, and the weighted sum over what is seen.

The chunk mask makes one network, the flow's, both streaming and non-streaming.

With chunks of C positions, query i may see key j when

    j < length                                   key j is not padding                    (every row)
    floor(j / C) <= floor(i / C)                 key j is in the chunk of i or before it  (streaming rows only)

Key 0 satisfies both for every i, so no query is ever left without a key and no softmax runs over an empty set.

Whether a row streams is a property of the row, (B,) bool, not of the batch: what an utterance contributes
to a loss must not depend on the utterances it happens to be batched with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def padding_mask(lens: Tensor, length: int) -> Tensor:
    """Lengths (B,) -> (B, length) bool, True at positions below the length of the row, False at padding."""
    return torch.arange(length, device=lens.device) < lens[:, None]


def attention_mask(keys: Tensor, streaming: Tensor, chunk_size: int) -> Tensor:
    """Valid keys (B, T) bool, streaming rows (B,) bool -> (B, T, T) bool; True: query (dim 1) may see key (dim 2)."""
    chunk = torch.arange(keys.shape[1], device=keys.device) // chunk_size  # (T,)
    past = chunk[None, :] <= chunk[:, None]  # (T, T)
    return keys[:, None, :] & (past | ~streaming[:, None, None])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Softmax attention: q (B, H, T, d), k, v (B, H, S, d) -> (B, H, T, d).

    mask (B, 1 or H, T, S), bool or to be added; None: no query sees a later key, S = T.
    By torch's fused kernel, but for bf16 on a CPU, where that is no faster than float32 and matrix products are.
    """
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=v.dtype).masked_fill(~mask, -math.inf)
    with torch.autocast("cpu", enabled=False):
        q = (q / math.sqrt(q.shape[-1])).to(v.dtype)
        weights = (q @ k.transpose(-2, -1) + mask.to(v.dtype)).softmax(-1)
        return F.dropout(weights, dropout) @ v
