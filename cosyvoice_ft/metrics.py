"""Numbers of a wave: pitch, level, silence, clipping, clicks; and of a copy beside its original, frame by frame.

Pitch: candidates are the peaks of the normalised cross-correlation (Talkin, 1995, RAPT)

    r(t, tau) = sum_n x(t + n) x(t + n + tau) / sqrt(e(t) e(t + tau)),   n = 0 .. W - 1,  e(t) = sum_n x(t + n)^2

refined by a parabola through the peak and its neighbours; the path through them and "unvoiced" is the cheapest one by
the costs of Boersma (1993): an octave down costs OCTAVE, a jump OCTAVE_JUMP an octave, a change of voicing VOICING.

wav: float32 tensor (T,) in [-1, 1] at `rate` Hz; T' frames.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from cosyvoice_ft import audio
from cosyvoice_ft.levels import FRAME, silent_frames

PITCH_HOP = 160  # samples at 16 kHz = 10 ms
PITCH_WINDOW = 480  # samples at 16 kHz = 30 ms: W
LOWEST, HIGHEST = 60.0, 500.0  # Hz
LOWPASS = 1000.0  # Hz: above it speech is breath and noise as much as voice
CANDIDATES = 6  # a frame, and "unvoiced"
OCTAVE, OCTAVE_JUMP, VOICING = 0.01, 0.5, 0.2
VOICED_ABOVE, SILENT_BELOW = 0.6, 0.03  # correlation; amplitude of the loudest frame
TINY = 1e-10

CLIPPED_RUN = 3  # samples in a row at the peak
QUIET = 1e-3  # peak below which a wave says nothing: -60 dBFS
CLICK = 0.02  # least size of the sixth difference at a click, as a share of what a full-scale impulse gives
CLICK_RATIO = 8.0  # times what is around it
CLICK_LASTS, CLICK_AROUND = 0.0008, 0.015  # s
INTRUSIVE = {"pesq": "pesq", "stoi": "pystoi"}  # measure: the package that brings it
GROSS = 0.2  # a pitch more than this share off is another pitch (Rabiner et al., 1976)


# ---- pitch


def pitch(wav16k: Tensor) -> np.ndarray:
    """Return the fundamental frequency in Hz of each 10 ms of a wave (T,) at 16 kHz, 0 where there is no voice: (T',).

    T' = 1 + T // 160; frame k is centred on sample 160 k.
    """
    x = lowpass(wav16k.numpy().astype(np.float64))
    r, amplitude = cross_correlation(x)
    frequencies, strengths = candidates(r)
    loud = amplitude / max(amplitude.max(), TINY)
    unvoiced = VOICED_ABOVE + np.maximum(0.0, 2.0 - loud * (1 + VOICED_ABOVE) / SILENT_BELOW)
    if amplitude.max() < QUIET:
        return np.zeros(len(r))
    return best_path(frequencies, np.concatenate([strengths, unvoiced[:, None]], axis=1))


def lowpass(x: np.ndarray) -> np.ndarray:
    """Take away the mean and what lies above LOWPASS, by a raised cosine of 500 Hz: (T,) -> (T,)."""
    spectrum = np.fft.rfft(x - x.mean(), 2 * len(x))  # zeros behind: nothing comes round from the other end
    hertz = np.fft.rfftfreq(2 * len(x), 1 / audio.ANALYSIS_RATE)
    spectrum *= 0.5 + 0.5 * np.cos(np.pi * np.clip((hertz - LOWPASS) / 500, 0, 1))
    return np.fft.irfft(spectrum)[: len(x)]


def cross_correlation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return r (T', lags + 1) of lags 0 .. one more than the longest period, and the RMS of each frame (T',)."""
    lags = math.ceil(audio.ANALYSIS_RATE / LOWEST) + 1
    reach = PITCH_WINDOW + lags  # samples that a frame looks at
    middle = (PITCH_WINDOW + lags // 2) // 2  # of the two windows, for a period between the shortest and the longest
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, (middle, reach)), reach)
    frames = frames[: len(x) + 1 : PITCH_HOP]  # (T', reach)
    size = 1 << (reach + PITCH_WINDOW - 1).bit_length()
    head = np.fft.rfft(frames[:, :PITCH_WINDOW], size)
    product = np.fft.irfft(head.conj() * np.fft.rfft(frames, size), size)[:, : lags + 1]
    sums = np.pad(np.cumsum(np.square(frames), axis=1), ((0, 0), (1, 0)))
    energy = sums[:, PITCH_WINDOW : PITCH_WINDOW + lags + 1] - sums[:, : lags + 1]  # e(t + tau)
    energy = np.maximum(energy, 0)
    return product / np.sqrt(energy[:, :1] * energy + TINY), np.sqrt(energy[:, 0] / PITCH_WINDOW)


def candidates(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies (T', CANDIDATES) in Hz of the best peaks, and their strengths, -inf for no peak."""
    shortest = math.floor(audio.ANALYSIS_RATE / HIGHEST)
    left, peak, right = r[:, shortest - 1 : -2], r[:, shortest:-1], r[:, shortest + 1 :]
    curve = np.minimum(left - 2 * peak + right, -TINY)
    shift = np.clip((left - right) / (2 * curve), -0.5, 0.5)
    height = np.minimum(peak - (left - right) * shift / 4, 1.0)
    hertz = audio.ANALYSIS_RATE / (np.arange(shortest, shortest + peak.shape[1]) + shift)
    is_peak = (peak > left) & (peak >= right) & (peak > 0) & (hertz >= LOWEST) & (hertz <= HIGHEST)
    strength = np.where(is_peak, height + OCTAVE * np.log2(hertz / LOWEST), -np.inf)
    best = np.argsort(-strength, axis=1, kind="stable")[:, :CANDIDATES]
    return np.take_along_axis(hertz, best, axis=1), np.take_along_axis(strength, best, axis=1)


def best_path(frequencies: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Return (T',) in Hz, 0 for unvoiced. strengths (T', CANDIDATES + 1): the last is "unvoiced"."""
    octaves = np.log2(frequencies)
    total, came_from = strengths[0], np.zeros(strengths.shape, int)
    for t in range(1, len(strengths)):
        cost = np.full((strengths.shape[1],) * 2, VOICING)  # (before, now)
        cost[:-1, :-1] = OCTAVE_JUMP * np.abs(octaves[t - 1][:, None] - octaves[t])
        cost[-1, -1] = 0.0
        reached = total[:, None] - cost
        came_from[t] = reached.argmax(axis=0)
        total = reached.max(axis=0) + strengths[t]
    path = [int(total.argmax())]
    for t in range(len(strengths) - 1, 0, -1):
        path.append(int(came_from[t, path[-1]]))
    with_unvoiced = np.pad(frequencies, ((0, 0), (0, 1)))
    return with_unvoiced[np.arange(len(path)), path[::-1]]


def pitch_facts(f0: np.ndarray) -> dict[str, float]:
    """Return the geometric mean in Hz, the standard deviation in semitones, and the share of voiced frames.

    Nothing but the share where less than 50 ms is voiced.
    """
    voiced = f0[f0 > 0]
    facts = {"voiced": len(voiced) / len(f0)}
    if len(voiced) >= 5:
        semitones = 12 * np.log2(voiced)
        facts |= {"pitch": float(2 ** (semitones.mean() / 12)), "pitch_spread": float(semitones.std())}
    return facts


# ---- health


def health(wav: Tensor, rate: int) -> dict[str, float]:
    """Return level (dBFS, RMS of what is not silent), silence (share), longest_silence (s), clipped (share), clicks.

    active: seconds from the first to the last frame that is not silent. A frame of 20 ms is silent 40 dB below the
    loudest; a wave that stays below -60 dBFS is silent as a whole.
    """
    x = wav.numpy()
    silent = silent_frames(x, rate) if np.abs(x).max() >= QUIET else np.ones(max(1, int(len(x) / rate / FRAME)), bool)
    loud = np.flatnonzero(~silent)
    samples = round(FRAME * rate)
    squares = [np.square(x[k * samples : (k + 1) * samples], dtype=np.float64).mean() for k in loud]
    return {
        "level": 10 * math.log10(np.mean(squares)) if squares else -math.inf,
        "active": float(loud[-1] - loud[0] + 1) * FRAME if len(loud) else 0.0,
        "silence": float(silent.mean()),
        "longest_silence": float(runs(silent).max(initial=0)) * FRAME,
        "clipped": clipped(x),
        "clicks": len(clicks(x, rate)),
    }


def runs(flags: np.ndarray) -> np.ndarray:
    """Return the lengths of the runs of True in (T,)."""
    edges = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1)))
    return edges[1::2] - edges[::2]


def clipped(x: np.ndarray) -> float:
    """Return the share of samples that lie in a row, 3 or more, within 0.1 % of the peak."""
    size = np.abs(x)
    if size.max() < QUIET:
        return 0.0
    flat = runs(size >= 0.999 * size.max())
    return float(flat[flat >= CLIPPED_RUN].sum() / len(x))


def clicks(x: np.ndarray, rate: int) -> np.ndarray:
    """Return the samples at which something shorter than a millisecond stands out: an impulse, a step.

    The sixth difference leaves what changes from sample to sample. A plosive stays loud after its burst, the next
    pulse of a voice is as loud as the last; a click has nothing like it within 15 ms on either side. Of 235 natural
    recordings 11 hold one; an impulse of 0.3 in speech of -20 dBFS is found in 3 places of 4.
    """
    sharp = np.abs(np.diff(np.pad(x.astype(np.float64), 3, mode="edge"), 6)) / 20  # 20: what an impulse of 1 gives
    lasts, around = round(CLICK_LASTS * rate), round(CLICK_AROUND * rate)
    own = largest(np.pad(sharp, lasts), 2 * lasts + 1)
    beside = largest(np.pad(sharp, around), around - lasts)  # at n: of the samples n - around .. n - lasts - 1
    before, after = beside[: len(x)], beside[around + lasts + 1 :]
    stands_out = (sharp == own) & (sharp >= CLICK) & (sharp > CLICK_RATIO * np.maximum(before, after))
    found = np.flatnonzero(stands_out)
    return found[np.diff(found, prepend=-lasts - 1) > lasts]  # a step gives two equal ones


def largest(x: np.ndarray, width: int) -> np.ndarray:
    """Return the maximum of `width` samples from each on: (T,) -> (T - width + 1,)."""
    return torch.nn.functional.max_pool1d(torch.from_numpy(x)[None, None], width, stride=1)[0, 0].numpy()


# ---- a copy beside its original


def copy_facts(copy16k: Tensor, natural16k: Tensor) -> dict[str, float]:
    """Compare two time-aligned waves (T,) at 16 kHz frame by frame; the longer one is cut.

    voicing_error: share of 10 ms frames voiced in one alone. gross_pitch_error: share of the frames voiced in both
    whose pitch is more than 20 % off; pitch_error: RMS in semitones over the others. pesq (wide band) and stoi where
    these packages are installed.
    """
    length = min(len(copy16k), len(natural16k))
    ours, theirs = copy16k[:length], natural16k[:length]
    a, b = pitch(ours), pitch(theirs)
    facts = {"voicing_error": float(((a > 0) != (b > 0)).mean())}
    both = (a > 0) & (b > 0)
    if both.any():
        a, b = a[both], b[both]
        gross = np.abs(a / b - 1) > GROSS
        facts["gross_pitch_error"] = float(gross.mean())
        if not gross.all():
            facts["pitch_error"] = float(np.sqrt(np.square(12 * np.log2(a[~gross] / b[~gross])).mean()))
    for name, measure in intrusive().items():
        facts[name] = measure(theirs.numpy(), ours.numpy())
    return facts


def mel_distance(copy24k: Tensor, natural24k: Tensor) -> float:
    """Return the distance of two time-aligned waves (T,) at 24 kHz in dB: RMS over the 80 mel bands, mean over frames.

    The longer wave is cut.
    """
    length = min(len(copy24k), len(natural24k))
    difference = audio.log_mel(copy24k[:length]) - audio.log_mel(natural24k[:length])  # (T', 80)
    return float(difference.square().mean(dim=1).sqrt().mean()) * 20 / math.log(10)


@lru_cache
def intrusive() -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """Return the installed ones of "pesq", "stoi" as functions of (natural, copy), both (T,) at 16 kHz."""
    found = {}
    if find_spec(INTRUSIVE["pesq"]):
        from pesq import NoUtterancesError, pesq

        def wide_band(natural: np.ndarray, copy: np.ndarray) -> float:
            try:
                return float(pesq(audio.ANALYSIS_RATE, natural, copy, "wb"))
            except NoUtterancesError:
                return math.nan

        found["pesq"] = wide_band
    if find_spec(INTRUSIVE["stoi"]):
        from pystoi import stoi

        found["stoi"] = lambda natural, copy: float(stoi(natural, copy, audio.ANALYSIS_RATE))
    return found
