"""Whose voice it is: speaker vectors of two encoders, their means of natural recordings, cosines between them.

CAM++ is the encoder that the recipe conditions on. Resemblyzer's was trained by others on other data, for another loss
(GE2E, Wan et al., 2018), and so judges independently; its weights lie in the Resemblyzer package, whose own code is not
needed:

    mel (40 bands, power, 25 ms every 10 ms) --windows of 1.6 s, half of them shared--> 3 x LSTM(256) --last state-->
    relu(linear) --normalise--> mean over the windows --normalise--> (256,)
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from cosyvoice_ft import audio
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.levels import FRAME, silent_frames

HOP, WINDOW, BANDS = 160, 400, 40  # samples at 16 kHz = 10 ms, 25 ms; mel bands
PARTIAL, STEP, COVERED = 160, 77, 0.75  # frames of a window; between two; share that the last must fill
LEVEL = 10 ** (-30 / 20)  # RMS up to which quiet waves are raised: -30 dBFS
PAUSE = 5  # frames of 20 ms: what stays of a silence at either end


class Resemblyzer:
    """Resemblyzer's speaker encoder: a vector of unit length of each wave."""

    def __init__(self) -> None:
        """Raises BadInput when the package is not installed, or is another than the one whose weights we know."""
        package = find_spec("resemblyzer")
        if not package:
            raise BadInput("Resemblyzer is not installed: pip install --no-deps Resemblyzer")
        path = Path(package.submodule_search_locations[0], "pretrained.pt")
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
            self.lstm, self.linear = nn.LSTM(BANDS, 256, num_layers=3, batch_first=True), nn.Linear(256, 256)
            for name, part in (("lstm.", self.lstm), ("linear.", self.linear)):
                own = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
                part.load_state_dict(own)
        except (OSError, RuntimeError, KeyError) as error:
            raise BadInput(f"{path}: not the weights of Resemblyzer 0.1 ({error}); install it again") from error

    @torch.inference_mode()
    def __call__(self, wav16k: Tensor) -> np.ndarray:
        """wav (T,) at 16 kHz -> (256,) float32. Raises BadInput for a wave without sound."""
        wav = without_long_silence(wav16k)
        rms = float(wav.square().mean().sqrt()) if len(wav) else 0.0
        if rms < 1e-6:
            raise BadInput("no sound to take a voice from")
        mels = windows(power_mel(wav * max(1.0, LEVEL / rms)))  # (windows, 160, 40)
        _, (state, _) = self.lstm(mels)
        vectors = nn.functional.normalize(self.linear(state[-1]).relu())  # (windows, 256)
        return nn.functional.normalize(vectors.mean(dim=0), dim=0).numpy()


def without_long_silence(wav: Tensor) -> Tensor:
    """Cut what lies more than 100 ms within a silence out of a wave (T,) at 16 kHz."""
    loud = ~silent_frames(wav.numpy(), audio.ANALYSIS_RATE)
    near = np.convolve(loud, np.ones(2 * PAUSE + 1))[PAUSE:-PAUSE] > 0
    kept = torch.from_numpy(near).repeat_interleave(round(FRAME * audio.ANALYSIS_RATE))
    return wav[: len(kept)][kept[: len(wav)]]


def power_mel(wav: Tensor) -> Tensor:
    """Return (T', 40) of a wave (T,), T' = 1 + T // 160."""
    spectrum = torch.stft(wav, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True)
    return spectrum.abs().square().T @ _filters()


def windows(mel: Tensor) -> Tensor:
    """Cut a spectrum (T', 40) into windows (windows, 160, 40); the last is filled with zeros, or left out if short."""
    starts = list(range(0, max(1, len(mel) - PARTIAL + STEP + 1), STEP))
    if len(starts) > 1 and len(mel) - 1 - starts[-1] < COVERED * PARTIAL:
        starts.pop()
    mel = nn.functional.pad(mel, (0, 0, 0, max(0, starts[-1] + PARTIAL - len(mel))))
    return torch.stack([mel[start : start + PARTIAL] for start in starts])


@lru_cache
def _filters() -> Tensor:
    return melscale_fbanks(
        WINDOW // 2 + 1, 0.0, 8000.0, BANDS, audio.ANALYSIS_RATE, norm="slaney", mel_scale="slaney"
    )  # (201, 40)


class MeanVoices:
    """The mean vector of each speaker's natural recordings; a recording is never compared with a mean that holds it."""

    def __init__(self, vectors: Mapping[str, np.ndarray], utt2spk: Mapping[str, str]) -> None:
        """vectors: {utt: (D,)} of natural recordings."""
        self.vectors, self.utt2spk = vectors, utt2spk
        self.sums: dict[str, np.ndarray] = {}
        for utt, vector in vectors.items():
            self.sums[utt2spk[utt]] = self.sums.get(utt2spk[utt], 0.0) + vector.astype(np.float64)
        self.counts = Counter(utt2spk[utt] for utt in vectors)

    def similarities(self, vector: np.ndarray, itself: str | None = None) -> dict[str, float]:
        """Return {spk: cosine to the speaker's mean} of a vector (D,).

        itself: the utterance of the vector where it is one of these recordings; it is left out of its speaker's mean,
        and a speaker of whom nothing else is known is not compared with.
        """
        own = self.utt2spk[itself] if itself in self.vectors else None
        known = [spk for spk, count in self.counts.items() if count > (spk == own)]
        return {spk: cosine(vector, self.sums[spk] - (self.vectors[itself] if spk == own else 0.0)) for spk in known}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
