"""Who may look at whom: padding masks and the chunk mask that makes one network both streaming and non-streaming.

With chunks of C positions, query i may see key j when

    j < length                                   key j is not padding                    (every row)
    floor(j / C) <= floor(i / C)                 key j is in the chunk of i or before it  (streaming rows only)

Key 0 satisfies both for every i, so no query is ever left without a key and no softmax runs over an empty set.

Whether a row streams is a property of the row, (B,) bool, not of the batch: what an utterance contributes
to a loss must not depend on the utterances it happens to be batched with.
"""

import torch
from torch import Tensor


def padding_mask(lens: Tensor, length: int) -> Tensor:
    """Lengths (B,) -> (B, length) bool, True at positions below the length of the row, False at padding."""
    return torch.arange(length, device=lens.device) < lens[:, None]


def attention_mask(keys: Tensor, streaming: Tensor, chunk_size: int) -> Tensor:
    """Valid keys (B, T) bool, streaming rows (B,) bool -> (B, T, T) bool; True: query (dim 1) may see key (dim 2)."""
    chunk = torch.arange(keys.shape[1], device=keys.device) // chunk_size  # (T,)
    past = chunk[None, :] <= chunk[:, None]  # (T, T)
    return keys[:, None, :] & (past | ~streaming[:, None, None])
