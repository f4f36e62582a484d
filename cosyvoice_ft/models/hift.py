"""HiFT: log-mel -> waveform, a harmonic source filtered by an upsampling network that ends in an inverse STFT.

    f0 = |linear(convs(mel))|                                   pitch of every frame, Hz                (B, T)
    e_h = alpha sin(2 pi sum h f0 / R) + sigma z_h              where f0 > threshold (voiced), h = 1..H
    e_h = alpha / 3 z_h                                         elsewhere
    s = tanh(sum_h w_h e_h + b)                                 the source                              (B, 1, N)
    x = conv(mel);  x <- mean_k res_k(up(x) + res(down(STFT(s))))     three times: 8, 5, 3 steps for one
    [a, p] = conv(x);  wav = iSTFT(min(exp a, 100) e^(i sin p))                                         (B, N)

Rows of a batch may end before T, at `frames` (B,): every convolution then reads zeros beyond the end of a row, as it
does around a row alone, and both STFTs see a row up to its end; so a row says the same alone and beside others.

B batch, T mel frames at 50 Hz, R samples a second (24000), hop = 8 * 5 * 3 * 4 = 480 samples a frame, N = hop T,
H = 9 sines (the fundamental and 8 harmonics), z normal noise, K = n_fft / 2 + 1 = 9 bins of an STFT of 16 samples
every 4, C channels: 512, halved by each upsampling.

Sources: Li et al., "HiFTNet", arXiv:2309.09493; Kaneko et al., "iSTFTNet", arXiv:2203.02395; Wang et al., "Neural
source-filter-based waveform model", arXiv:1810.11946; Ziyin et al., "Neural networks fail to learn periodic functions
and how to fix it" (snake), arXiv:2006.08195. Names and numbers are those of the vocoder of CosyVoice2-0.5B.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.nn.utils.rnn import pad_sequence

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.attention import padding_mask

EDGE_KERNEL = 7  # frames: conv_pre and conv_post, the same for every size of the model
F0_KERNEL = 3  # frames
F0_LAYERS = 5
MAX_MAGNITUDE = 100.0  # of an output STFT bin
GAIN, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"  # w = gain * v / |v|


def published_name(name: str) -> str:
    """Return the name that a tensor of a GAN checkpoint, or of an older weight norm, has in a published hift.pt."""
    return name.removeprefix("generator.").replace("weight_g", GAIN).replace("weight_v", DIRECTION)


def conv(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> nn.Module:
    """Return a weight-normed convolution, (B, in, T) -> (B, out, T)."""
    padding = dilation * (kernel_size - 1) // 2
    return weight_norm(nn.Conv1d(in_channels, out_channels, kernel_size, dilation=dilation, padding=padding))


def padding(ends: Tensor | None, length: int) -> Tensor | None:
    """Return where rows that end at `ends` (B,) have padding: (B, 1, length) bool."""
    return None if ends is None else ~padding_mask(ends, length).unsqueeze(1)


def silenced(x: Tensor, padded: Tensor | None) -> Tensor:
    """Return x (B, C, T) with zeros where `padded` (B, 1, T)."""
    return x if padded is None else x.masked_fill(padded, 0)


def by_row(function: Callable[[Tensor], Tensor], x: Tensor, ends: Tensor | None) -> Tensor:
    """Apply a function (1, ..., n) -> (1, ..., m) to each row up to its end; zeros after what comes of it."""
    if ends is None:
        return function(x)
    rows = [function(row[None, ..., :n])[0].movedim(-1, 0) for row, n in zip(x, ends.tolist(), strict=True)]
    return pad_sequence(rows, batch_first=True).movedim(1, -1)


class Snake(nn.Module):
    """x + sin^2(a x) / a with a learnt a for every channel, (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha.unsqueeze(-1)  # (C, 1)
        return x + (alpha * x).sin().square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """For each dilation: x + conv(snake(dilated_conv(snake(x)))), (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(conv(channels, channels, kernel_size, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(channels, channels, kernel_size) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        for i, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            inner = conv1(self.activations1[i](silenced(x, padded)))  # snake(0) = 0
            x = x + conv2(self.activations2[i](silenced(inner, padded)))
        return x


class F0Predictor(nn.Module):
    """Five convolutions and a linear layer, mel (B, in_channels, T) -> f0 (B, T), Hz."""

    def __init__(self, in_channels: int, cond_channels: int):
        super().__init__()
        widths = [in_channels] + [cond_channels] * F0_LAYERS
        layers = [(conv(widths[i], widths[i + 1], F0_KERNEL), nn.ELU()) for i in range(F0_LAYERS)]
        self.condnet = nn.Sequential(*(module for layer in layers for module in layer))
        self.classifier = nn.Linear(cond_channels, 1)

    def forward(self, mel: Tensor, padded: Tensor | None = None) -> Tensor:
        x = mel
        for layer in self.condnet:
            x = layer(silenced(x, padded))
        f0 = self.classifier(x.transpose(1, 2)).squeeze(-1).abs()
        return f0 if padded is None else f0.masked_fill(padded[:, 0], 0)  # then the phase stays where the row ends


class HarmonicSource(nn.Module):
    """Sines at the multiples of f0 in voiced frames, noise in the others, mixed to one signal.

    The paper's second branch, plain noise beside the harmonics, has no consumer in this network: it is not drawn.
    """

    def __init__(
        self, nb_harmonics: int, sampling_rate: int, hop: int, *, alpha: float, sigma: float, voiced_threshold: float
    ):
        super().__init__()
        self.sampling_rate, self.hop = sampling_rate, hop
        self.alpha, self.sigma, self.voiced_threshold = alpha, sigma, voiced_threshold
        self.l_linear = nn.Linear(nb_harmonics + 1, 1)

    def voiced(self, f0: Tensor) -> Tensor:
        """Return which frames are voiced: f0 (B, T) Hz -> (B, T) bool."""
        return f0 > self.voiced_threshold

    @torch.no_grad()  # a phase summed over seconds gives f0 no usable gradient: f0 learns from a loss of its own
    def sines(self, f0: Tensor, noise: Tensor) -> Tensor:
        """Return e of the head docstring: f0 (B, T) Hz, noise (B, hop T, H) -> (B, hop T, H).

        f0 is constant within a frame, so the phase is summed over frames and interpolated between their centres, in
        float64: after 30 s at 220 Hz float32 is off by half of sigma, after 80 s by more (training cuts 1 s). The
        reference also gives each harmonic a random initial phase, in a sample it never reads again: none is drawn here.
        """
        harmonic = torch.arange(1, self.l_linear.in_features + 1, device=f0.device)  # (H,)
        turns = (f0.unsqueeze(-1) * harmonic / self.sampling_rate % 1).double().cumsum(dim=1) * self.hop  # (B, T, H)
        turns = F.interpolate(turns.transpose(1, 2), scale_factor=float(self.hop), mode="linear").transpose(1, 2)
        phase = 2 * math.pi * (turns % 1).float()  # (B, hop T, H) radians
        voiced = self.voiced(f0).repeat_interleave(self.hop, dim=1).unsqueeze(-1)  # (B, hop T, 1)
        return torch.where(voiced, self.alpha * phase.sin() + self.sigma * noise, self.alpha / 3 * noise)

    def forward(self, f0: Tensor, noise: Tensor) -> Tensor:
        """f0 (B, T) Hz, noise (B, hop T, H) -> (B, 1, hop T)."""
        return self.l_linear(self.sines(f0, noise)).tanh().transpose(1, 2)


class HiFTGenerator(nn.Module):
    """The vocoder of CosyVoice2, mel (B, 80, T) -> wav (B, 480 T) in [-0.99, 0.99] at 24 kHz.

    sampling_rate and nsf_voiced_threshold are in Hz, n_fft and istft_hop in samples.
    """

    def __init__(
        self,
        *,
        in_channels: int = 80,
        base_channels: int = 512,
        cond_channels: int = 512,
        nb_harmonics: int = 8,
        sampling_rate: int = 24000,
        nsf_alpha: float = 0.1,
        nsf_sigma: float = 0.003,
        nsf_voiced_threshold: float = 10,
        upsample_rates: Sequence[int] = (8, 5, 3),
        upsample_kernel_sizes: Sequence[int] = (16, 11, 7),
        n_fft: int = 16,
        istft_hop: int = 4,
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3,
        source_resblock_kernel_sizes: Sequence[int] = (7, 7, 11),
        source_resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3,
        lrelu_slope: float = 0.1,
        audio_limit: float = 0.99,
    ):
        super().__init__()
        self.n_fft, self.istft_hop = n_fft, istft_hop
        self.lrelu_slope, self.audio_limit = lrelu_slope, audio_limit
        self.hop = math.prod(upsample_rates) * istft_hop  # samples a frame
        self.f0_predictor = F0Predictor(in_channels, cond_channels)
        nsf = {"alpha": nsf_alpha, "sigma": nsf_sigma, "voiced_threshold": nsf_voiced_threshold}
        self.m_source = HarmonicSource(nb_harmonics, sampling_rate, self.hop, **nsf)
        self.conv_pre = conv(in_channels, base_channels, EDGE_KERNEL)
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        self.blocks_per_stage = len(resblock_kernel_sizes)
        channels, stride = base_channels, math.prod(upsample_rates)  # stride: STFT frames in one step of a stage
        source_blocks = zip(source_resblock_kernel_sizes, source_resblock_dilation_sizes, strict=True)
        for rate, kernel, source_block in zip(upsample_rates, upsample_kernel_sizes, source_blocks, strict=True):
            up = nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            channels, stride = channels // 2, stride // rate
            down_kernel = 2 * stride if stride > 1 else 1
            self.source_downs.append(nn.Conv1d(n_fft + 2, channels, down_kernel, stride, padding=stride // 2))
            self.source_resblocks.append(ResBlock(channels, *source_block))
            for size, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True):
                self.resblocks.append(ResBlock(channels, size, dilations))
        self.conv_post = conv(channels, n_fft + 2, EDGE_KERNEL)

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor], **settings) -> Self:
        """Return the vocoder that `weights` describe, holding those tensors.

        Sizes come from names and shapes; `settings` are the other arguments of the constructor (rates, dilations, ...).
        A GAN checkpoint (`generator.*`, `discriminator.*`) and the older weight-norm names serve too. Raises BadInput
        for weights of something else, KeyError or RuntimeError for names that are missing or shapes that do not fit.
        """
        weights = {published_name(name): w for name, w in weights.items() if not name.startswith("discriminator.")}
        pre = weights.get(f"conv_pre.{DIRECTION}")
        if pre is None or pre.shape[-1] != EDGE_KERNEL:
            found = "no conv_pre" if pre is None else f"a conv_pre of kernel {pre.shape[-1]}, not {EDGE_KERNEL}"
            raise BadInput(f"vocoder weights: found {found}; give the hift.pt of a CosyVoice2 model directory")

        def kernels(layer: str, convolution: str = "") -> list[int]:
            """Return the kernel sizes of layer.0, layer.1, ... as far as there are weights."""
            names = (f"{layer}.{i}.{convolution}{DIRECTION}" for i in itertools.count())
            return [weights[name].shape[-1] for name in itertools.takewhile(weights.__contains__, names)]

        upsample_kernels, resblock_kernels = kernels("ups"), kernels("resblocks", "convs1.0.")
        sizes = {
            "base_channels": pre.shape[0],
            "in_channels": pre.shape[1],
            "cond_channels": weights["f0_predictor.classifier.weight"].shape[1],
            "nb_harmonics": weights["m_source.l_linear.weight"].shape[1] - 1,
            "n_fft": weights[f"conv_post.{DIRECTION}"].shape[0] - 2,
            "upsample_kernel_sizes": upsample_kernels,
            "resblock_kernel_sizes": resblock_kernels[: len(resblock_kernels) // len(upsample_kernels)],
            "source_resblock_kernel_sizes": kernels("source_resblocks", "convs1.0."),
        }
        with torch.device("meta"):
            model = cls(**sizes, **settings)
        model.load_state_dict(weights, strict=True, assign=True)
        return model

    def fold_weight_norm(self) -> None:
        """Compute gain * v / |v| once: inference saves 25 ms a call on a CPU, training and saving need it unfolded."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight", leave_parametrized=True)

    def predict_f0(self, mel: Tensor, frames: Tensor | None = None) -> Tensor:
        """mel (B, 80, T) -> f0 (B, T), Hz, 0 beyond `frames`; float32 under autocast too (see `source`)."""
        with torch.autocast(mel.device.type, enabled=False):
            return self.f0_predictor(mel.float(), padding(frames, mel.shape[-1]))

    def source(self, f0: Tensor, sine_noise: Tensor) -> Tensor:
        """f0 (B, T) Hz, sine_noise (B, hop T, H) ~ N(0, 1) -> source (B, 1, hop T).

        Always float32: a phase of thousands of turns a second would keep no fraction of a turn in half precision.
        """
        with torch.autocast(f0.device.type, enabled=False):
            return self.m_source(f0.float(), sine_noise.float())

    def draw_noise(self, frames: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """Draw sine_noise (B, hop T, H) for rows of `frames`, each by a generator of its own; zeros at the padding."""
        sines = self.m_source.l_linear.in_features
        rows = [torch.randn(self.hop * n, sines, generator=g) for n, g in zip(frames, generators, strict=True)]
        return pad_sequence(rows, batch_first=True)

    def stft(self, source: Tensor) -> Tensor:
        """source (B, N) -> real and imaginary parts (B, 2 K, N / istft_hop + 1)."""
        window = torch.hann_window(self.n_fft, device=source.device)  # (n_fft,)
        spectrum = torch.stft(source, self.n_fft, self.istft_hop, window=window, return_complex=True)
        return torch.cat([spectrum.real, spectrum.imag], dim=1)

    def istft(self, x: Tensor) -> Tensor:
        """x (B, 2 K, N / istft_hop + 1), the logarithm of the magnitude and the arcsine of the phase -> wav (B, N)."""
        log_magnitude, phase = x.float().chunk(2, dim=1)
        spectrum = torch.polar(log_magnitude.exp().clamp(max=MAX_MAGNITUDE), phase.sin())
        window = torch.hann_window(self.n_fft, device=x.device)  # (n_fft,)
        wav = torch.istft(spectrum, self.n_fft, self.istft_hop, window=window)
        return wav.clamp(-self.audio_limit, self.audio_limit)

    def decode(self, mel: Tensor, source: Tensor, frames: Tensor | None = None) -> Tensor:
        """mel (B, 80, T), source (B, 1, hop T) -> wav (B, hop T), zeros after hop * frames."""
        assert source.shape[-1] == self.hop * mel.shape[-1], f"{source.shape[-1]} samples for {mel.shape[-1]} frames"

        def ends(steps: int, more: int = 0) -> Tensor | None:
            """Return where the rows end that have so many steps a frame, and some more."""
            return None if frames is None else steps * frames + more

        stft = by_row(self.stft, source.squeeze(1), ends(self.hop))  # (B, 2 K, T hop / istft_hop + 1)
        padded, steps = padding(ends(1), mel.shape[-1]), 1
        x = self.conv_pre(silenced(mel, padded))  # (B, C, T)
        for i, up in enumerate(self.ups):
            x, steps = up(silenced(F.leaky_relu(x, self.lrelu_slope), padded)), steps * up.stride[0]
            last = up is self.ups[-1]
            if last:  # the STFT has one frame more than hop / istft_hop times T
                x = F.pad(x, (1, 0), mode="reflect")
            padded = padding(ends(steps, more=last), x.shape[-1])
            x = x + self.source_resblocks[i](self.source_downs[i](stft), padded)
            blocks = self.resblocks[i * self.blocks_per_stage : (i + 1) * self.blocks_per_stage]
            x = sum(block(x, padded) for block in blocks) / self.blocks_per_stage
        x = self.conv_post(silenced(F.leaky_relu(x), padded))  # (B, 2 K, T hop / istft_hop + 1); torch's slope, 0.01
        return by_row(self.istft, x, ends(steps, more=1))

    def forward(
        self,
        mel: Tensor,
        sine_noise: Tensor,
        frames: Tensor | None = None,
        *,
        cache_source: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Inference: mel (B, 80, T), sine_noise (B, hop T, H) -> wav (B, hop T), source (B, 1, hop T).

        frames (B,) int64: where the rows of a padded batch end; the wave is zero from there. A stream hands in, for
        frames it repeats, the end of the source of its last call: `cache_source` (B, 1, n) replaces the first n
        samples, so that the harmonics go on in phase.
        """
        source = self.source(self.predict_f0(mel, frames), sine_noise)
        if cache_source is not None:
            source = torch.cat([cache_source, source[..., cache_source.shape[-1] :]], dim=-1)
        return self.decode(mel, source, frames), source

    def training_forward(self, speech_feat: Tensor, sine_noise: Tensor) -> tuple[Tensor, Tensor]:
        """speech_feat (B, T, 80), sine_noise (B, hop T, H) -> wav (B, hop T), f0 (B, T) Hz, both with gradients."""
        mel = speech_feat.transpose(1, 2)  # (B, 80, T)
        f0 = self.predict_f0(mel)
        return self.decode(mel, self.source(f0, sine_noise)), f0
