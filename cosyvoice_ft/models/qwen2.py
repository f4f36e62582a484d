"""Qwen2, the transformer inside the language model (Yang et al., Qwen2 Technical Report, 2024), for embeddings in.

A layer, x of any leading shape (..., D):

    x <- x + o( attention( rot(q(n)), rot(k(n)), v(n) ) )   n = RMSNorm(x) = x / sqrt(mean(x^2) + eps) * w
    x <- x + down( silu(gate(n)) * up(n) )                  n = RMSNorm(x)

H query heads share K < H heads of keys and values (grouped-query attention). rot turns each pair (a, b) =
(x_i, x_{i + d/2}) of a head of size d by the angle position * theta^(-2i/d) (RoPE, Su et al., 2021).

Which positions see which is not the layers' business: they get a `context`, one of

    Rows(...)   training: many rows packed one after another into (N, D), each position sees its own row up to itself
    Cache()     decoding: rows (B, L, D) that continue what the cache holds

Names are those of the published weights; the text head `lm_head` is in them and never used.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice_ft.models.attention import attend


@lru_cache
def _inverse_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/d) for i < d/2: (d/2,)."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def rotation(position: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """position (...) -> cos, sin (..., 1, d), the same for every head."""
    angle = position[..., None].float() * _inverse_frequencies(size, theta, position.device)
    angle = torch.cat([angle, angle], -1)[..., None, :]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., heads, d), each pair (x_i, x_{i + d/2}) turned by its angle."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, L, H, d), k and v (B, S, K, d) -> (B, L, H, d); each key head serves H / K query heads. No mask: causal."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


class Rows:
    """B rows packed one after another: nothing is computed for padding, and no row sees another.

    pack (N,): where the packed positions lie in a grid of B x L, flat, row by row.
    """

    def __init__(self, pack: Tensor, rows: int, length: int) -> None:
        self.pack, self.grid = pack, (rows, length)
        self.position = pack % length

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, d), k, v (N, K, d) -> (N, H, d). On the right of a row is padding, which causality hides."""
        q, k, v = (self.unpack(x) for x in (q, k, v))
        return grouped(q, k, v, None).flatten(0, 1).index_select(0, self.pack)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, L, ...), zeros at the padding."""
        grid = x.new_zeros(math.prod(self.grid), *x.shape[1:])
        return grid.index_copy(0, self.pack, x).unflatten(0, self.grid)


class Cache:
    """Keys and values of what has been read: rows (B, L, D) continue it. `lengths` (B,) says how much of a row counts.

    Rows may differ in length: what lies right of `lengths` is overwritten by what comes next and never seen.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: Tensor | None = None
        self.longest = 0  # at least the longest of `lengths`, known without asking the device

    def feed(self, batch: int, new: int, device: torch.device, new_lengths: Tensor | None = None) -> None:
        """Make room for `new` positions a row, of which new_lengths (B,) count (default: all)."""
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = self.lengths[:, None] + torch.arange(new, device=device)  # (B, new)
        self.first = self.longest == 0  # nothing was read before: plain causal attention
        self.longest += new
        self.mask = (torch.arange(self.longest, device=device) <= self.position[..., None])[:, None]  # (B, 1, new, S)
        self.lengths = self.lengths + (new if new_lengths is None else new_lengths)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, L, H, d), k, v (B, L, K, d) -> (B, L, H, d)."""
        if layer == len(self.keys):
            self.keys.append(k.new_zeros(k.shape[0], 0, *k.shape[2:]))
            self.values.append(v.new_zeros(v.shape[0], 0, *v.shape[2:]))
        if self.first:
            self.keys[layer], self.values[layer] = k, v
            return grouped(q, k, v, None)
        keys, values = self.write(self.keys, layer, k), self.write(self.values, layer, v)
        return grouped(q, keys, values, self.mask)

    def write(self, store: list[Tensor], layer: int, x: Tensor) -> Tensor:
        """Put x (B, L, K, d) at its positions and return what is there, (B, S, K, d); the store grows by doubling."""
        have = store[layer]
        if have.shape[1] < self.longest:
            more = have.new_zeros(have.shape[0], max(self.longest, 2 * have.shape[1]), *have.shape[2:])
            more[:, : have.shape[1]] = have
            store[layer] = have = more
        have.scatter_(1, self.position[..., None, None].expand_as(x), x.to(have.dtype))
        return have[:, : self.longest]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices) only."""
        self.keys, self.values = ([x[rows] for x in store] for store in (self.keys, self.values))
        self.lengths = self.lengths[rows]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w, the mean in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k, v."""

    def __init__(self, size: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_size = size // heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, kv_heads * self.head_size)
        self.v_proj = nn.Linear(size, kv_heads * self.head_size)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, layer: int, turn: tuple[Tensor, Tensor], context: Rows | Cache) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(context.attention(layer, rotate(q, *turn), rotate(k, *turn), v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size: int, inner: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(size, heads, kv_heads)
        self.mlp = MLP(size, inner)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def forward(self, x: Tensor, layer: int, turn: tuple[Tensor, Tensor], context: Rows | Cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layer, turn, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2Model(nn.Module):
    """Embeddings (..., D) and a context -> normed last states (..., D)."""

    def __init__(
        self,
        *,
        vocab_size: int = 151936,
        hidden_size: int = 896,
        intermediate_size: int = 4864,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 14,
        num_key_value_heads: int = 2,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
    ) -> None:
        super().__init__()
        self.head_size, self.rope_theta = hidden_size // num_attention_heads, rope_theta
        sizes = (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(num_hidden_layers))
        self.norm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(self, x: Tensor, context: Rows | Cache) -> Tensor:
        turn = rotation(context.position, self.head_size, self.rope_theta)
        for number, layer in enumerate(self.layers):
            x = layer(x, number, turn, context)
        return self.norm(x)


class Qwen2ForCausalLM(nn.Module):
    """The published pair of model and (tied) text head."""

    def __init__(self, **sizes: float) -> None:
        super().__init__()
        self.model = Qwen2Model(**sizes)
        vocab_size, hidden_size = self.model.embed_tokens.weight.shape
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        self.lm_head.weight = self.model.embed_tokens.weight


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "rms_norm_eps")


def sizes_of(config: dict) -> dict:
    """Return the arguments of Qwen2Model that a config.json holds; rope_theta where either generation of it stands.

    Raises KeyError for a key that is missing.
    """
    rope = config.get("rope_parameters") or config
    return {key: config[key] for key in SIZES} | {"rope_theta": float(rope["rope_theta"])}
