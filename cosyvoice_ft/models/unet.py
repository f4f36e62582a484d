"""Velocity estimator of the flow: a U-Net of one level, causal in time, over mel frames at 50 Hz.

    e = MLP(sinusoid(t))                                   time in [0, 1] -> (B, E)
    x = concat(x, mu, spks, cond)                          along channels, spks repeated in time
    s = down(x, e)                                         stage: resnet, then transformer blocks
    x = conv(s);  x = mid(x, e) 12 times;  x = conv(up(concat(x, s), e))
    v = proj(block(x))                                     velocity

    resnet(x, e) = block(block(x) + Linear(mish(e))) + conv1x1(x)
    block(x)     = mish(LayerNorm(conv3(x)))               conv3 sees this frame and two before it
    transformer  = x + attention(norm1(x)), then x + ff(norm3(x))

With a single level there is no change of rate, the only trace of the "U" is the skip s. Convolutions look back only and
attention follows the chunk mask, so a streaming row knows nothing after the chunk it is in. Padding is multiplied by 0
before every convolution and hidden from every query, hence frames of a row never depend on what follows it.

B batch, T frames, C channels inside, E time channels. The sinusoid is that of Ho et al. 2020 (arXiv:2006.11239) with
1000 t for the step; the blocks are those of Matcha-TTS (Mehta et al. 2023, arXiv:2309.03199) made causal as in
CosyVoice 2 (Du et al. 2024, arXiv:2412.10117). Names and numbers follow the released CosyVoice2-0.5B.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice_ft.models.attention import attend, attention_mask


def time_sinusoid(t: Tensor, size: int) -> Tensor:
    """Times (B,) in [0, 1] -> (B, size) float32: sines, then cosines, of 1000 t 10000^(-i / (size / 2 - 1))."""
    half = size // 2
    rate = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000.0) / (half - 1)))
    angle = 1000.0 * t.float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Time in [0, 1] -> sinusoid -> Linear, SiLU, Linear."""

    def __init__(self, *, sinusoids: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(sinusoids, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        return self.linear_2(F.silu(self.linear_1(time_sinusoid(t, self.linear_1.in_features))))


class CausalConv1d(nn.Conv1d):
    """Convolution whose output at frame i sees the inputs i - kernel + 1 to i."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T)."""
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Transpose(nn.Module):
    """(B, C, T) <-> (B, T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class CausalBlock(nn.Module):
    """Causal convolution of three frames, LayerNorm over channels, Mish; padding is 0 going in and coming out."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        conv = CausalConv1d(channels_in, channels, 3)
        self.block = nn.Sequential(conv, Transpose(), nn.LayerNorm(channels), Transpose(), nn.Mish())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, C', T), mask (B, 1, T) -> (B, C, T)."""
        return self.block(x * mask) * mask


class CausalResnetBlock(nn.Module):
    """Two causal blocks with the time embedding added between them, around a 1x1 shortcut."""

    def __init__(self, channels_in: int, channels: int, *, time_channels: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_channels, channels))
        self.block1 = CausalBlock(channels_in, channels)
        self.block2 = CausalBlock(channels, channels)
        self.res_conv = nn.Conv1d(channels_in, channels, 1)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """x (B, C', T), time (B, E), mask (B, 1, T) -> (B, C, T)."""
        h = self.block1(x, mask) + self.mlp(time)[..., None]
        return self.block2(h, mask) + self.res_conv(x * mask)


class Attention(nn.Module):
    """Multi-head self-attention without positions; the convolutions around it know about order."""

    def __init__(self, *, channels: int, inner: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels), nn.Dropout(dropout))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, C), visible (B, T, T) bool -> (B, T, C)."""
        q, k, v = (to(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        y = attend(q, k, v, visible[:, None])  # (B, H, T, inner / H)
        return self.to_out(y.transpose(1, 2).flatten(2))


class LinearGELU(nn.Module):
    """Linear followed by the exact GELU."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, *, channels: int, inner: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(LinearGELU(channels, inner), nn.Dropout(dropout), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed forward, each added to its input."""

    def __init__(self, *, channels: int, inner: int, ff: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels=channels, inner=inner, heads=heads, dropout=dropout)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels=channels, inner=ff, dropout=dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (B, T, C), visible (B, T, T) bool -> (B, T, C)."""
        x = x + self.attn1(self.norm1(x), visible)
        return x + self.ff(self.norm3(x))


class Stage(nn.ModuleList):
    """Child 0: resnet; child 1: transformer blocks; child 2, where there is one: a convolution for the caller."""

    def forward(self, x: Tensor, time: Tensor, mask: Tensor, visible: Tensor) -> Tensor:
        """x (B, C', T), time (B, E), mask (B, 1, T), visible (B, T, T) bool -> (B, C, T)."""
        x = self[0](x, time, mask).transpose(1, 2)
        for block in self[1]:
            x = block(x, visible)
        return x.transpose(1, 2)


class CausalConditionalDecoder(nn.Module):
    """Velocity of the noisy mel x at time t under the conditions mu, spks, cond; structure at the head of this file."""

    def __init__(
        self,
        *,
        in_channels: int = 320,
        out_channels: int = 80,
        channels: int = 256,
        time_channels: int = 1024,
        n_blocks: int = 4,
        num_mid_blocks: int = 12,
        inner: int = 512,
        ff: int = 1024,
        num_heads: int = 8,
        chunk_size: int = 50,
        dropout: float = 0.0,
    ):
        super().__init__()
        transformer = {"channels": channels, "inner": inner, "ff": ff, "heads": num_heads, "dropout": dropout}

        def stage(width: int, *tail: nn.Module) -> Stage:
            resnet = CausalResnetBlock(width, channels, time_channels=time_channels)
            return Stage([resnet, nn.ModuleList(TransformerBlock(**transformer) for _ in range(n_blocks)), *tail])

        self.chunk_size = chunk_size
        self.time_mlp = TimeEmbedding(sinusoids=in_channels, channels=time_channels)
        self.down_blocks = nn.ModuleList([stage(in_channels, CausalConv1d(channels, channels, 3))])
        self.mid_blocks = nn.ModuleList(stage(channels) for _ in range(num_mid_blocks))
        self.up_blocks = nn.ModuleList([stage(2 * channels, CausalConv1d(channels, channels, 3))])
        self.final_block = CausalBlock(channels, channels)
        self.final_proj = nn.Conv1d(channels, out_channels, 1)

    @staticmethod
    def sizes(weights: dict[str, Tensor]) -> dict[str, int]:
        """Constructor arguments that the names and shapes of an estimator's weights show. Raises KeyError."""
        conv = weights["down_blocks.0.0.block1.block.0.weight"]
        blocks = "down_blocks.0.1."
        return {
            "in_channels": conv.shape[1],
            "out_channels": weights["final_proj.weight"].shape[0],
            "channels": conv.shape[0],
            "time_channels": weights["time_mlp.linear_1.weight"].shape[0],
            "n_blocks": len({name.split(".")[3] for name in weights if name.startswith(blocks)}),
            "num_mid_blocks": len({name.split(".")[1] for name in weights if name.startswith("mid_blocks.")}),
            "inner": weights[blocks + "0.attn1.to_q.weight"].shape[0],
            "ff": weights[blocks + "0.ff.net.0.proj.weight"].shape[0],
        }

    def forward(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor, streaming: Tensor
    ) -> Tensor:
        """Velocity (B, 80, T), 0 at padding.

        x, mu, cond (B, 80, T), mask (B, 1, T) 1 = frame and 0 = padding, t (B,), spks (B, 80), streaming (B,) bool.
        """
        time = self.time_mlp(t)  # (B, E)
        visible = attention_mask(mask[:, 0].bool(), streaming, self.chunk_size)  # (B, T, T)
        x = torch.cat([x, mu, spks[..., None].expand(-1, -1, x.shape[2]), cond], dim=1)  # (B, 320, T)

        down, up = self.down_blocks[0], self.up_blocks[0]
        skip = down(x, time, mask, visible)  # (B, C, T)
        x = down[2](skip * mask)
        for mid in self.mid_blocks:
            x = mid(x, time, mask, visible)
        x = up(torch.cat([x, skip], dim=1), time, mask, visible)
        x = self.final_block(up[2](x * mask), mask)
        return self.final_proj(x * mask) * mask
