"""Conditional flow matching with optimal-transport paths: training loss and sampler.

A flow carries noise z ~ N(0, 1) at t = 0 to a mel x1 at t = 1. Along the straight path between them (Lipman et al.
2023, arXiv:2210.02747, equations 20 to 23), with sigma = `sigma_min`,

    y_t = (1 - (1 - sigma) t) z + t x1                     interpolant                                      (1)
    u   = dy_t / dt = x1 - (1 - sigma) z                   its velocity, constant in t                      (2)
    loss = sum over frames and bins of |v(y_t, t | c) - u|^2                                                (3)

where the estimator v sees the conditions c = (mu, spks, cond). In training c is zeroed in some rows (keep = False), so
that one network also knows the unconditional velocity; the sampler moves away from that one (classifier-free guidance,
Ho & Salimans 2022, arXiv:2207.12598), with w = `inference_cfg_rate`,

    v_w = (1 + w) v(x, t | c) - w v(x, t | 0)                                                               (4)

and integrates dx = v_w dt by Euler's rule at times that lie closer together where the path begins,

    tau_k = 1 - cos(pi k / 2n),  k = 0 ... n               cosine schedule                                  (5)
    x <- x + (tau_{k+1} - tau_k) v_w(x, tau_k)             n steps from x = z                               (6)

Training draws t ~ U(0, 1) without the schedule. Noise, times and dropped rows come in as arguments.

At synthesis the noise of a frame is a fixed function of its absolute position (`fixed_noise`): a stream that computes
the beginning again with every new chunk finds the same noise there, and a sentence always sounds the same.

B batch, T mel frames at 50 Hz; x1, z, y, u, mu, cond (B, 80, T), spks (B, 80), mask (B, 1, T) 1 = frame, 0 = padding,
t (B,), keep and streaming (B,) bool.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

NOISE_FRAMES = 15000  # 300 s at 50 Hz


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """Return a generator of torch's on the CPU, seeded by the next number of `rng`."""
    return torch.Generator().manual_seed(int(rng.integers(2**63)))


@lru_cache(maxsize=2)
def fixed_noise(channels: int = 80, frames: int = NOISE_FRAMES, seed: int = 0) -> Tensor:
    """Standard normal noise (1, channels, frames) on the CPU: the noise that the released models are sampled from."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, channels, frames, generator=generator, device="cpu")


class CausalConditionalCFM(nn.Module):
    """Loss and sampler around a velocity estimator(x, mask, mu, t, spks, cond, streaming) -> (B, 80, T)."""

    def __init__(self, *, estimator: nn.Module, sigma_min: float = 1e-6, inference_cfg_rate: float = 0.7):
        super().__init__()
        self.estimator = estimator
        self.sigma_min = sigma_min
        self.inference_cfg_rate = inference_cfg_rate

    def loss(
        self,
        x1: Tensor,
        mask: Tensor,
        mu: Tensor,
        spks: Tensor,
        cond: Tensor,
        *,
        t: Tensor,
        z: Tensor,
        keep: Tensor,
        streaming: Tensor,
    ) -> Tensor:
        """Sum of squared velocity errors over all valid frames and bins (3), float32 scalar."""
        time, kept = t[:, None, None], keep[:, None, None]
        y = (1 - (1 - self.sigma_min) * time) * z + time * x1
        u = x1 - (1 - self.sigma_min) * z
        pred = self.estimator(y, mask, mu * kept, t, spks * keep[:, None], cond * kept, streaming)
        return ((pred.float() - u) * mask).square().sum()

    def velocity(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor, streaming: Tensor
    ) -> Tensor:
        """Guided velocity v_w (4), (B, 80, T) float32, from one pass over 2B rows."""
        mu, spks, cond = (torch.cat([c, torch.zeros_like(c)]) for c in (mu, spks, cond))
        x, mask, t, streaming = (torch.cat([c, c]) for c in (x, mask, t, streaming))
        known, free = self.estimator(x, mask, mu, t, spks, cond, streaming).float().chunk(2)
        return (1 + self.inference_cfg_rate) * known - self.inference_cfg_rate * free

    def sample(
        self,
        z: Tensor,
        mask: Tensor,
        mu: Tensor,
        spks: Tensor,
        cond: Tensor,
        *,
        streaming: Tensor,
        n_timesteps: int = 10,
    ) -> Tensor:
        """Carry the noise z to a mel (B, 80, T) float32 in n steps (5, 6). Padding keeps its noise."""
        tau = 1 - torch.cos(torch.linspace(0, 0.5 * math.pi, n_timesteps + 1, device=z.device))
        x = z.float()
        for now, then in zip(tau[:-1], tau[1:], strict=True):
            x = x + (then - now) * self.velocity(x, mask, mu, now.expand(len(x)), spks, cond, streaming)
        return x
