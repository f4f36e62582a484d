"""Repetition aware sampling of speech tokens (Chen et al., VALL-E 2, 2024, section 3.2).

1. Nucleus: candidates in order of probability, while the probability before them is below `top_p` and there are fewer
   than `top_k`; one is drawn in proportion to its probability.
2. If the drawn token occurs at least `win_size * tau_r` times in the last `win_size` decoded tokens, it is ruled out
   and another is drawn from all the rest, without a nucleus.

`scores` (V,) are log-probabilities; `uniform()` returns the next number in [0, 1) of the caller's generator.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw(weights: Tensor, u: float) -> int:
    """Return the first i with cumsum(weights)[i] / sum(weights) > u. weights (N,) >= 0."""
    cumulative = weights.double().cumsum(0)  # float64: thousands of small terms
    return int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))


def nucleus(scores: Tensor, *, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the probabilities and the ids of the candidates, most probable first."""
    probs, ids = scores.softmax(0).sort(descending=True, stable=True)
    before = torch.cat([probs.new_zeros(1), probs[:-1]]).double().cumsum(0)
    kept = int((before[:top_k] < top_p).sum())
    return probs[:kept], ids[:kept]


def ras_sampling(
    scores: Tensor,
    decoded: Sequence[int],
    uniform: Callable[[], float],
    *,
    top_p: float = 0.8,
    top_k: int = 25,
    win_size: int = 10,
    tau_r: float = 0.1,
) -> int:
    """Draw the next token; `decoded` are the tokens emitted so far, the prompt's not among them."""
    probs, ids = nucleus(scores, top_p=top_p, top_k=top_k)
    token = int(ids[draw(probs, uniform())])
    if sum(past == token for past in decoded[-win_size:]) >= win_size * tau_r:
        rest = scores.clone()
        rest[token] = -torch.inf
        token = draw(rest.softmax(0), uniform())
    return token
