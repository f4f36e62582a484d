"""Sound files and acoustic features: the one reader, the one writer, and the three spectra the networks look at.

    file --load_wav--> wav --pad_to_token--> wav24k --log_mel--> speech_feat (T, 80)        50 Hz: flow, vocoder
                                               |
                                            resample--> wav16k --whisper_mel--> (128, T)   100 Hz: speech tokenizer
                                                               --fbank--------> (T, 80)    100 Hz: campplus

Pad once, at 24 kHz, and derive everything from that wave: then every token has exactly 2 mel and 4 whisper frames.
Tokens of the wave as recorded and the mel of the padded one disagree by 2 frames for a quarter of all lengths.

wav: float32 tensor (T,) in [-1, 1], one channel. Constants of the signal path are made on first use, kept per device.
"""

import io
import math
import re
import shlex
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional
from torchaudio.compliance import kaldi
from torchaudio.functional import melscale_fbanks
from torchaudio.transforms import Resample

from cosyvoice_ft.files import BadInput, whole

SAMPLE_RATE = 24000  # Hz: mel, vocoder, everything written
ANALYSIS_RATE = 16000  # Hz: whisper mel and fbank; also the lowest rate of a recording
TOKEN_RATE = 25  # Hz: speech tokens
TOKEN_SECONDS = 1 / TOKEN_RATE  # 0.04 s
HOP = 480  # samples at 24 kHz = 20 ms: one mel frame
FFT = 1920  # samples at 24 kHz = 80 ms: window and transform of the mel
N_MELS = 80
FMAX = 8000  # Hz: upper edge of the highest mel band
WHISPER_HOP = 160  # samples at 16 kHz = 10 ms
WHISPER_MELS = 128
FBANK_MELS = 80

TOKEN_SAMPLES = SAMPLE_RATE // TOKEN_RATE  # samples at 24 kHz = 40 ms
MEL_PER_TOKEN = TOKEN_SAMPLES // HOP
WHISPER_PER_TOKEN = ANALYSIS_RATE // TOKEN_RATE // WHISPER_HOP
assert (TOKEN_SAMPLES, MEL_PER_TOKEN, WHISPER_PER_TOKEN) == (960, 2, 4)
assert TOKEN_SAMPLES == MEL_PER_TOKEN * HOP and ANALYSIS_RATE == TOKEN_RATE * WHISPER_PER_TOKEN * WHISPER_HOP

UNKNOWN_SIZE = 0x7FFFF000  # bytes: what programs that write to a pipe put for the size of the sound, or more
MPEG_SLACK = 2304  # samples: two frames, by which the header of an mp3 may count too many
LARGEST_KERNEL = 2**25  # taps of a resampling filter; 44101 Hz would need 10^9, usual rates need fewer than 10^6
FORMATS = {".wav": "WAV", ".flac": "FLAC"}


class BadSound(BadInput):
    """A sound file that cannot be used: `rule` is the rule it breaks, in a word, `value` what was found."""

    def __init__(self, path: str | Path, rule: str, value: str, cure: str) -> None:
        super().__init__(f"{path}: {value}; {cure}")
        self.rule, self.value = rule, value


def load_wav(path: str | Path, sample_rate: int | None = None) -> Tensor:
    """Read a sound file as wav (T,): mean over its channels, resampled to `sample_rate` Hz (None: as recorded).

    A wave that leaves [-1, 1] (float files, overshoot of resampling) is divided by its largest magnitude.
    Raises BadSound for a file that is missing, no file, empty, undecodable, cut off, below 16 kHz or not finite.
    """
    with _open(path) as sound:
        try:
            samples = sound.read(dtype="float32", always_2d=True)  # (T, channels)
        except soundfile.LibsndfileError as error:
            reason = f"decoding fails{error.error_string and f' ({error.error_string})'}"
            raise BadSound(path, "truncated", reason, "copy or record it again") from error
        promised, wav, source_rate = sound.frames, samples.mean(axis=1), sound.samplerate
        slack = MPEG_SLACK + promised // 100 if sound.format == "MP3" else 0
    if len(wav) < promised - slack:
        raise BadSound(path, "truncated", f"{len(wav)} of {promised} samples can be decoded", "copy the file again")
    if not np.isfinite(wav).all():
        raise BadSound(path, "undecodable", "holds samples that are not numbers (NaN or infinite)", "write it again")
    wav = resample(torch.from_numpy(wav), source_rate, sample_rate or source_rate)
    peak = float(np.abs(wav.numpy()).max())
    return wav / peak if peak > 1 else wav


def duration(path: str | Path) -> tuple[float, int]:
    """Return (seconds, samples at the file's own rate) by its header, without decoding. Raises BadSound as load_wav."""
    with _open(path) as sound:
        return sound.frames / sound.samplerate, sound.frames


def _open(path: str | Path) -> soundfile.SoundFile:
    """Open a sound file whose header promises something that can be used, or raise BadSound."""
    path = Path(path)
    cure = f"convert it: ffmpeg -i {shlex.quote(str(path))} -ar {SAMPLE_RATE} new.wav"
    try:
        if path.is_dir():
            raise BadSound(path, "undecodable", "is a directory", "give a sound file (wav, flac, ogg, mp3)")
        if path.stat().st_size == 0:
            raise BadSound(path, "undecodable", "the file is empty (0 bytes)", "copy it again")
        cut = _cut_off(path)
        sound = soundfile.SoundFile(path)
    except FileNotFoundError as error:
        raise BadSound(path, "missing", "does not exist", "give a sound file (wav, flac, ogg, mp3)") from error
    except OSError as error:
        raise BadSound(path, "undecodable", f"cannot be read ({error.strerror})", "mend its permissions") from error
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless *.raw
        reason = getattr(error, "error_string", error)
        raise BadSound(path, "undecodable", f"not a sound file that can be decoded ({reason})", cure) from error
    rate, samples = sound.samplerate, sound.frames
    common = math.gcd(rate, SAMPLE_RATE)
    if cut:
        problem = "truncated", cut, "copy the file again"
    elif samples == 0:
        problem = "undecodable", "holds no samples", "record it again or leave it out"
    elif samples == sys.maxsize:
        problem = "undecodable", "written to a pipe, its header does not tell the length", cure
    elif rate < ANALYSIS_RATE:
        problem = "rate", f"{rate} Hz", f"recordings need at least {ANALYSIS_RATE} Hz, leave it out"
    elif (rate // common) * (SAMPLE_RATE // common) > LARGEST_KERNEL:
        problem = "rate", f"{rate} Hz is no usual rate", cure
    else:
        return sound
    sound.close()
    raise BadSound(path, *problem)


def _cut_off(path: Path) -> str:
    """Return what tells that a file ends early though libsndfile reads it as whole, "" when nothing does.

    The headers of WAV and NIST give the bytes of the sound; the last page of an Ogg file says that it is the last.
    """
    size, promised = path.stat().st_size, 0
    with open(path, "rb") as file:
        head = file.read(1024)
        if head.startswith(b"OggS"):
            file.seek(max(0, size - 2**16))
            page = file.read().rpartition(b"OggS")[2]  # version, flags, 20 bytes, number of segments, their sizes
            last = len(page) > 22 and page[1] & 4 and len(page) >= 23 + page[22] + sum(page[23 : 23 + page[22]])
            return "" if last else "its last page is not whole"
        if (nist := re.match(rb"NIST_1A\s+(\d+)", head)) and b"-s3 pcm" in head:
            fields = {key: int(value) for key, value in re.findall(rb"(\w+) -i (\d+)", head)}
            samples = fields.get(b"sample_count", 0) * fields.get(b"channel_count", 1)
            promised = int(nist[1]) + samples * fields.get(b"sample_n_bytes", 2)
        elif head.startswith(b"RIFF"):
            file.seek(12)
            while len(chunk := file.read(8)) == 8 and not promised:
                length = int.from_bytes(chunk[4:], "little")
                if chunk[:4] == b"data" and length < UNKNOWN_SIZE:
                    promised = file.tell() + length
                file.seek(length + length % 2, 1)
    return f"{promised - size} bytes fewer than its header says" if promised > size else ""


def save_wav(path: str | Path, wav: Tensor, sample_rate: int) -> None:
    """Write wav (T,) as 16-bit .wav or .flac, whole or not at all; what leaves [-1, 1] is clipped, folders are made.

    Raises BadInput for another suffix, ValueError for samples that are not numbers.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"{path}: cannot write '{path.suffix}'; name it {' or '.join('*' + name for name in FORMATS)}")
    if not wav.isfinite().all():
        raise ValueError(f"{path}: the wave holds NaN or infinite samples")
    samples, encoded = wav.detach().cpu().clamp(-1.0, 1.0).numpy(), io.BytesIO()
    soundfile.write(encoded, samples, sample_rate, format=FORMATS[path.suffix.lower()], subtype="PCM_16")
    with whole(path) as part:
        part.write_bytes(encoded.getbuffer())  # libsndfile itself hides a full disk


def resample(wav: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Resample (..., T) to (..., ceil(T * target_rate / source_rate)): windowed sinc, torchaudio's defaults."""
    return wav if source_rate == target_rate else _resampler(source_rate, target_rate, wav.device)(wav)


def pad_to_token(wav: Tensor, sample_rate: int) -> Tensor:
    """Append zeros to (..., T) up to a whole number of speech tokens (40 ms)."""
    samples, rest = divmod(sample_rate, TOKEN_RATE)
    if rest:
        raise ValueError(f"a token of {TOKEN_SECONDS} s is not a whole number of samples at {sample_rate} Hz")
    return functional.pad(wav, (0, -wav.shape[-1] % samples))


def log_mel(wav24k: Tensor, fmax: float = FMAX) -> Tensor:
    """Log mel spectrum of a wave (T,) at 24 kHz as (T // 480, 80): log of Slaney-filtered magnitudes, floor 1e-5.

    Frames are not centred: 720 reflected samples at both ends make frame k start at sample 480 k - 720.
    Raises BadInput for less than a token (40 ms) of sound. Source: the mel of Matcha-TTS / HiFi-GAN.
    """
    _require_token(wav24k, SAMPLE_RATE)
    edge = (FFT - HOP) // 2
    wav = functional.pad(wav24k[None], (edge, edge), mode="reflect")[0]
    spectrum = torch.stft(wav, FFT, HOP, window=_window(wav.device), center=False, return_complex=True)  # (961, T)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    return (magnitude.T @ _mel_filters(fmax, wav.device)).clamp(min=1e-5).log()


def whisper_mel(wav16k: Tensor) -> Tensor:
    """Whisper's log mel of one wave (T,) at 16 kHz as (128, T // 160).

    Its floor lies 8 decades below the loudest point of what is handed in: never concatenate, batch or pad further.
    Raises BadInput for less than a token (40 ms) of sound.
    """
    from whisper.audio import log_mel_spectrogram  # brings a compiler along, which only this function should pay for

    _require_token(wav16k, ANALYSIS_RATE)
    return log_mel_spectrogram(wav16k, n_mels=WHISPER_MELS)


def fbank(wav16k: Tensor) -> Tensor:
    """Kaldi's log filter bank of a wave (T,) at 16 kHz as (frames, 80), 25 ms every 10 ms, minus its mean over time.

    Raises BadInput for less than a token (40 ms) of sound.
    """
    _require_token(wav16k, ANALYSIS_RATE)
    features = kaldi.fbank(wav16k[None], num_mel_bins=FBANK_MELS, dither=0.0, sample_frequency=ANALYSIS_RATE)
    return features - features.mean(dim=0)


def _require_token(wav: Tensor, sample_rate: int) -> None:
    if wav.shape[-1] * TOKEN_RATE < sample_rate:
        needed = sample_rate // TOKEN_RATE
        raise BadInput(f"{wav.shape[-1]} samples at {sample_rate} Hz are too short; {needed} (40 ms) is the least")


@lru_cache
def _resampler(source_rate: int, target_rate: int, device: torch.device) -> Resample:
    return Resample(source_rate, target_rate).to(device)


@lru_cache
def _window(device: torch.device) -> Tensor:
    return torch.hann_window(FFT, device=device)


@lru_cache
def _mel_filters(fmax: float, device: torch.device) -> Tensor:
    """(961, 80): one triangle of unit area per column, evenly spaced on Slaney's mel scale from 0 to `fmax` Hz."""
    return melscale_fbanks(FFT // 2 + 1, 0.0, fmax, N_MELS, SAMPLE_RATE, norm="slaney", mel_scale="slaney").to(device)
