"""Token encoder of the flow: speech tokens at 25 Hz -> hidden frames at 50 Hz.

A Transformer with relative positions at the token rate, nearest-neighbour upsampling, and a second, shorter one at
the frame rate. (The published class is called a conformer; its convolution modules are switched off.)

    x = embed(token vectors)                               Linear, LayerNorm, times sqrt(D)
    x = x + conv2(leaky(conv1(x)))                         conv1 looks L = 3 tokens ahead, conv2 two back
    x = encoders(x)                                        N layers at the token rate, chunks of C tokens
    x = conv(repeat each token R = 2 times)                conv looks 2R frames back
    x = up_encoders(up_embed(x))                           4 layers at the frame rate, chunks of R C frames
    h = after_norm(x)

L = 3 tokens are the only look-ahead of a streaming row beyond its chunk. A layer is pre-norm: attention, then feed
forward, each added to its input. The attention is that of Transformer-XL (Dai et al. 2019, arXiv:1901.02860, section
3.3), in which content and distance have scores of their own; per head, with learned u and v,

    score(i, j) = [(q_i + u) . k_j  +  (q_i + v) . W r_{i-j}] / sqrt(D / H)

where r_n is the sinusoid of the offset n: sin and cos of n 10000^(-2m/D) in columns 2m and 2m + 1. The second term is
handed to the attention as an additive bias, -inf where the key may not be seen.

B batch, S tokens, T positions of either rate, D width, H heads. Names and numbers follow the released CosyVoice2-0.5B.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice_ft.models.attention import attend, attention_mask, padding_mask


def relative_sinusoids(length: int, size: int, device: torch.device) -> Tensor:
    """Sinusoids (2 length - 1, size) of the offsets length - 1, ..., 0, ..., -(length - 1), float32."""
    offset = torch.arange(length - 1, -length, -1.0, device=device)[:, None]
    angle = offset * torch.exp(torch.arange(0.0, size, 2.0, device=device) * -(math.log(10000.0) / size))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def by_key(score: Tensor) -> Tensor:
    """Scores by offset (B, H, T, 2T - 1) -> by key (B, H, T, T): entry (i, j) is that of offset i - j.

    Offset i - j stands in column T - 1 - i + j, so each query's row must move one place further to the left than
    the row above. Seen as one long string, that is what a pad of one per row and a new line length do.
    """
    b, h, t, _ = score.shape
    string = F.pad(score, (1, 0)).view(b, h, 2 * t, t)[:, :, 1:]
    return string.reshape(b, h, t, 2 * t - 1)[..., :t]


class RelativeAttention(nn.Module):
    """Multi-head self-attention with Transformer-XL scores (head of this file)."""

    def __init__(self, *, size: int = 512, heads: int = 8, dropout: float = 0.1):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, size // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, size // heads))
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)
        self.linear_pos = nn.Linear(size, size, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """(..., T, D) -> (..., H, T, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x: Tensor, visible: Tensor, position: Tensor) -> Tensor:
        """x (B, T, D), visible (B, T, T) bool, position (2T - 1, D) -> (B, T, D)."""
        q, k, v = self.split(self.linear_q(x)), self.split(self.linear_k(x)), self.split(self.linear_v(x))
        r = self.split(self.linear_pos(position))  # (H, 2T - 1, D / H)
        bias = by_key((q + self.pos_bias_v[:, None]) @ r.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        bias = bias.masked_fill(~visible[:, None], -math.inf)
        dropout = self.dropout if self.training else 0.0
        y = attend(q + self.pos_bias_u[:, None], k, v, bias, dropout)
        return self.linear_out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, *, size: int = 512, linear_units: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.w_1 = nn.Linear(size, linear_units)
        self.w_2 = nn.Linear(linear_units, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.w_2(self.dropout(F.silu(self.w_1(x))))


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed forward, each added to its input."""

    def __init__(self, *, size: int, heads: int, linear_units: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.self_attn = RelativeAttention(size=size, heads=heads, dropout=attention_dropout)
        self.feed_forward = FeedForward(size=size, linear_units=linear_units, dropout=dropout)
        self.norm_mha = nn.LayerNorm(size, eps=1e-12)
        self.norm_ff = nn.LayerNorm(size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor, position: Tensor) -> Tensor:
        """x (B, T, D), visible (B, T, T) bool, position (2T - 1, D) -> (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.norm_mha(x), visible, position))
        return x + self.dropout(self.feed_forward(self.norm_ff(x)))


class Embed(nn.Module):
    """Linear and LayerNorm, scaled by sqrt(D)."""

    def __init__(self, *, size: int, dropout: float, positional_dropout: float):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Dropout(dropout))
        self.scale = math.sqrt(size)
        self.dropout = nn.Dropout(positional_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.dropout(self.out(x) * self.scale)


class PreLookahead(nn.Module):
    """Two convolutions added to their input; output i depends on inputs i - 2 to i + L."""

    def __init__(self, *, size: int = 512, channels: int = 512, lookahead: int = 3):
        super().__init__()
        self.lookahead = lookahead
        self.conv1 = nn.Conv1d(size, channels, lookahead + 1)
        self.conv2 = nn.Conv1d(channels, size, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); zeros stand for what lies outside."""
        y = F.leaky_relu(self.conv1(F.pad(x.transpose(1, 2), (0, self.lookahead))))
        return x + self.conv2(F.pad(y, (2, 0))).transpose(1, 2)


class Upsample(nn.Module):
    """Each position R times, then a causal convolution of 2R + 1 frames."""

    def __init__(self, *, size: int = 512, stride: int = 2):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(size, size, 2 * stride + 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, R S, D)."""
        y = x.repeat_interleave(self.stride, dim=1).transpose(1, 2)
        return self.conv(F.pad(y, (2 * self.stride, 0))).transpose(1, 2)


class UpsampleConformerEncoder(nn.Module):
    """Token vectors (B, S, D) -> hidden frames (B, R S, D); structure and formulas at the head of this file.

    `embedded_padding` concerns the last L tokens of a row that is padded: what do they see ahead? By default zeros,
    as at the end of a row alone and in synthesis, so that a row's output does not depend on its batch. True restores
    the released training code, in which they see what `embed` makes of padding; recorded batches need it.
    """

    def __init__(
        self,
        *,
        size: int = 512,
        heads: int = 8,
        linear_units: int = 2048,
        num_blocks: int = 6,
        num_up_blocks: int = 4,
        up_stride: int = 2,
        lookahead: int = 3,
        lookahead_channels: int = 512,
        chunk_size: int = 25,
        dropout: float = 0.1,
        positional_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        embedded_padding: bool = False,
    ):
        super().__init__()
        layer = {"size": size, "heads": heads, "linear_units": linear_units}
        layer |= {"dropout": dropout, "attention_dropout": attention_dropout}
        embed = {"size": size, "dropout": dropout, "positional_dropout": positional_dropout}
        self.chunk_size, self.embedded_padding = chunk_size, embedded_padding
        self.position_dropout = nn.Dropout(positional_dropout)
        self.embed = Embed(**embed)
        self.pre_lookahead_layer = PreLookahead(size=size, channels=lookahead_channels, lookahead=lookahead)
        self.encoders = nn.ModuleList(EncoderLayer(**layer) for _ in range(num_blocks))
        self.up_layer = Upsample(size=size, stride=up_stride)
        self.up_embed = Embed(**embed)
        self.up_encoders = nn.ModuleList(EncoderLayer(**layer) for _ in range(num_up_blocks))
        self.after_norm = nn.LayerNorm(size)

    @staticmethod
    def sizes(weights: dict[str, Tensor]) -> dict[str, int]:
        """Constructor arguments that the names and shapes of an encoder's weights show. Raises KeyError."""
        conv1 = weights["pre_lookahead_layer.conv1.weight"]
        return {
            "size": weights["after_norm.weight"].shape[0],
            "heads": weights["encoders.0.self_attn.pos_bias_u"].shape[0],
            "linear_units": weights["encoders.0.feed_forward.w_1.weight"].shape[0],
            "num_blocks": len({name.split(".")[1] for name in weights if name.startswith("encoders.")}),
            "num_up_blocks": len({name.split(".")[1] for name in weights if name.startswith("up_encoders.")}),
            "up_stride": weights["up_layer.conv.weight"].shape[2] // 2,
            "lookahead": conv1.shape[2] - 1,
            "lookahead_channels": conv1.shape[0],
        }

    def forward(self, x: Tensor, lens: Tensor, streaming: Tensor, *, finalize: bool = True) -> tuple[Tensor, Tensor]:
        """x (B, S, D), lens (B,) tokens, streaming (B,) bool -> h (B, R S, D), lens (B,) frames.

        With finalize=False more tokens are to come: the last L of each row serve as look-ahead only, and h has
        R (S - L) frames.
        """
        x = self.embed(x)
        if not self.embedded_padding:
            x = x * padding_mask(lens, x.shape[1])[..., None]
        x = self.pre_lookahead_layer(x)
        if not finalize:
            ahead = self.pre_lookahead_layer.lookahead
            x, lens = x[:, :-ahead], lens - ahead
        x = self.attend(self.encoders, x, lens, streaming, self.chunk_size)

        stride = self.up_layer.stride
        x, lens = self.up_embed(self.up_layer(x)), lens * stride
        x = self.attend(self.up_encoders, x, lens, streaming, self.chunk_size * stride)
        return self.after_norm(x), lens

    def attend(self, layers: nn.ModuleList, x: Tensor, lens: Tensor, streaming: Tensor, chunk_size: int) -> Tensor:
        """Run x (B, T, D) through layers that share one mask and one table of positions."""
        length, size = x.shape[1:]
        visible = attention_mask(padding_mask(lens, length), streaming, chunk_size)  # (B, T, T)
        position = self.position_dropout(relative_sinusoids(length, size, x.device))  # (2T - 1, D)
        for layer in layers:
            x = layer(x, visible, position)
        return x
