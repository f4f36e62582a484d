"""Sound files of every kind, and the features against the recorded ones."""

import json

import numpy as np
import pytest
import soundfile
import torch

from cosyvoice_ft import audio
from cosyvoice_ft.files import BadInput

SIGNALS = ("chirp", "noise", "real")
RATES = (16000, 22050, 24000, 44100, 48000)


def sine(seconds: float, rate: int, hertz: float = 220.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(params=SIGNALS)
def recorded(request, goldens) -> tuple[str, int, dict[str, np.ndarray]]:
    """(file, source rate, arrays without their leading name and axis of one)."""
    file = f"features_{request.param}.npz"
    rate = json.loads((goldens / "features.json").read_text())["signals"][request.param]["source_rate"]
    with np.load(goldens / file) as arrays:
        named = {name.split(".", 1)[1]: arrays[name] for name in arrays.files}
    return file, rate, {name: a[0] if a.ndim > 1 and len(a) == 1 else a for name, a in named.items()}


@pytest.fixture
def waves(recorded) -> tuple[torch.Tensor, torch.Tensor]:
    """The recorded wave at 24 and at 16 kHz, both resampled from the source as the recorded features were."""
    _, rate, arrays = recorded
    source = torch.from_numpy(arrays["wav_src"])
    return audio.resample(source, rate, audio.SAMPLE_RATE), audio.resample(source, rate, audio.ANALYSIS_RATE)


# features against the record


def mel_cell_in_float64(wav: np.ndarray, *, frame: int, band: int, fmax: float) -> float:
    start = frame * 480 - 720
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1920) / 1920)
    power = np.abs(np.fft.rfft(wav[start : start + 1920].astype(np.float64) * window)) ** 2
    filters = audio.melscale_fbanks(961, 0.0, fmax, 80, 24000, norm="slaney", mel_scale="slaney").double().numpy()
    return float(np.log(np.sqrt(power + 1e-9) @ filters[:, band]))


# lengths


def test_every_length_gives_two_mel_and_four_whisper_frames_per_token():
    draw = np.random.default_rng(0)
    for i in range(200):
        rate = RATES[i % len(RATES)]
        source = torch.from_numpy(draw.normal(0, 0.1, draw.integers(1, rate)).astype(np.float32))
        wav24k = audio.pad_to_token(audio.resample(source, rate, 24000), 24000)
        tokens, rest = divmod(len(wav24k), audio.TOKEN_SAMPLES)
        wav16k = audio.resample(wav24k, 24000, 16000)
        assert rest == 0 and 0 <= tokens * audio.TOKEN_SECONDS - len(source) / rate < 0.0401, (rate, len(source))
        assert len(wav16k) == 640 * tokens, (rate, len(source))
        assert audio.log_mel(wav24k).shape == (2 * tokens, 80), (rate, len(source))
        assert audio.whisper_mel(wav16k).shape == (128, 4 * tokens), (rate, len(source))


@pytest.mark.parametrize("rate", RATES)
def test_padding_appends_the_fewest_zeros(rate):
    token = rate // 25
    for samples, padded in ((1, token), (token - 1, token), (token, token), (token + 1, 2 * token)):
        wav = audio.pad_to_token(torch.ones(samples), rate)
        assert len(wav) == padded and wav[:samples].eq(1).all() and wav[samples:].eq(0).all()


def test_padding_refuses_a_rate_without_whole_tokens():
    with pytest.raises(ValueError, match="11024 Hz"):
        audio.pad_to_token(torch.ones(10), 11024)


@pytest.mark.parametrize(("feature", "token"), [(audio.log_mel, 960), (audio.whisper_mel, 640), (audio.fbank, 640)])
def test_a_feature_needs_a_token_of_sound(feature, token):
    assert feature(torch.from_numpy(sine(0.04, token * 25))).isfinite().all()
    with pytest.raises(BadInput, match=f"{token - 1} samples .* {token} "):
        feature(torch.zeros(token - 1))


def test_silence_is_finite_and_at_the_floor():
    assert audio.log_mel(torch.zeros(4800)).eq(torch.tensor(1e-5).log()).all()
    assert audio.whisper_mel(torch.zeros(3200)).isfinite().all()
    assert audio.fbank(torch.zeros(3200)).isfinite().all()


def test_a_tone_lies_in_its_mel_band():
    low, high = (audio.log_mel(torch.from_numpy(sine(0.4, 24000, hertz))).mean(dim=0).argmax() for hertz in (440, 3000))
    edges = np.arange(1, 81) / 81 * (15 + 27 * np.log(8) / np.log(6.4))  # Slaney's scale: 15 mel per kHz up to 1 kHz
    assert abs(edges[low] - 440 * 0.015) < 0.6
    assert abs(edges[high] - (15 + 27 * np.log(3) / np.log(6.4))) < 0.6


# reading


@pytest.mark.parametrize(
    ("name", "subtype", "error"),
    [
        ("pcm16.wav", "PCM_16", 1e-4),
        ("pcm24.wav", "PCM_24", 1e-6),
        ("float.wav", "FLOAT", 1e-7),
        ("录音 一号.wav", "PCM_16", 1e-4),
        ("pcm24.flac", "PCM_24", 1e-6),
        ("vorbis.ogg", "VORBIS", 0.05),
        ("layer3.mp3", "MPEG_LAYER_III", 0.05),
        ("no suffix", "PCM_16", 1e-4),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_reading(tmp_path, name, subtype, error, channels):
    mono = sine(1.0, 24000)
    sound = np.stack([mono + 0.1, mono - 0.1][:channels], axis=1) - (0.1 if channels == 1 else 0.0)
    path = tmp_path / name
    soundfile.write(path, sound, 24000, subtype=subtype, format=None if path.suffix else "WAV")
    wav = audio.load_wav(path, 24000)
    assert wav.dtype == torch.float32 and wav.ndim == 1
    assert abs(len(wav) - 24000) <= (0 if error < 0.01 else 24)
    np.testing.assert_allclose(wav[2400:-2400], mono[2400 : len(wav) - 2400], atol=error)
    assert audio.duration(path) == pytest.approx((len(wav) / 24000, len(wav)), rel=0.01)


def test_reading_resamples_on_request(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(1.0, 44100), 44100)
    assert len(audio.load_wav(tmp_path / "a.wav")) == 44100
    assert audio.duration(tmp_path / "a.wav") == (1.0, 44100)
    wav = audio.load_wav(tmp_path / "a.wav", 24000)
    np.testing.assert_allclose(wav[240:-240], sine(1.0, 24000)[240:-240], atol=2e-3)


def test_a_loud_wave_is_scaled_to_one(tmp_path):
    soundfile.write(tmp_path / "loud.wav", 4 * sine(0.1, 24000), 24000, subtype="FLOAT")
    np.testing.assert_allclose(audio.load_wav(tmp_path / "loud.wav"), 2 * sine(0.1, 24000), atol=1e-3)
    soundfile.write(tmp_path / "square.wav", np.sign(sine(0.1, 16000)), 16000, subtype="FLOAT")
    assert audio.load_wav(tmp_path / "square.wav", 24000).abs().max() <= 1.0


def bad_files(folder) -> dict[str, str]:
    """{file name: what its message says}."""
    (folder / "directory").mkdir()
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not a sound")
    (folder / "headerless.raw").write_bytes(bytes(1000))
    soundfile.write(folder / "silent.wav", np.zeros(0), 24000)
    soundfile.write(folder / "telephone.wav", sine(1.0, 8000), 8000)
    soundfile.write(folder / "odd.wav", sine(0.1, 44101), 44101)
    soundfile.write(folder / "whole.flac", sine(1.0, 24000), 24000)
    pipe = bytearray((folder / "whole.flac").read_bytes())
    pipe[21:26] = bytes([pipe[21] & 0xF0, 0, 0, 0, 0])  # STREAMINFO: 36 bits of total samples, 0 = unknown
    (folder / "pipe.flac").write_bytes(pipe)
    return {
        "missing.wav": "does not exist",
        "directory": "is a directory",
        "empty.wav": "0 bytes",
        "text.wav": "not a sound file",
        "headerless.raw": "not a sound file",
        "silent.wav": "no samples",
        "telephone.wav": "8000 Hz.*at least 16000 Hz",
        "odd.wav": "44101 Hz is no usual rate",
        "pipe.flac": "header does not tell the length",
    }


def test_a_bad_file_is_refused_by_its_header_with_its_name_and_a_cure(tmp_path):
    for name, message in bad_files(tmp_path).items():
        for read in (audio.load_wav, audio.duration):
            with pytest.raises(BadInput, match=f"{name}: .*{message}.*[;,] ") as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_when_decoded(tmp_path):
    for name in ("cut.flac", "cut.mp3"):
        soundfile.write(tmp_path / name, sine(2.0, 24000), 24000)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(BadInput, match=f"{name}: "):
            audio.load_wav(tmp_path / name)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, np.inf]), 24000, subtype="FLOAT")
    with pytest.raises(BadInput, match="not numbers"):
        audio.load_wav(tmp_path / "nan.wav")


# writing


@pytest.mark.parametrize("name", ["made/on/the/way.wav", "句子.flac", "loud.WAV"])
def test_what_is_written_is_read_back(tmp_path, name):
    wav = torch.tensor([-1.0, -0.5, 0.0, 0.25, 32767 / 32768]).repeat(100)
    audio.save_wav(tmp_path / name, wav, 24000)
    assert soundfile.info(tmp_path / name).subtype == "PCM_16"
    assert audio.load_wav(tmp_path / name, 24000).equal(wav)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


def test_writing_clips(tmp_path):
    audio.save_wav(tmp_path / "a.wav", torch.tensor([-3.0, 3.0, 1.0]), 24000)
    assert soundfile.read(tmp_path / "a.wav", dtype="int16")[0].tolist() == [-32768, 32767, 32767]


def test_nothing_is_written_for_a_wrong_suffix_or_a_wave_of_nan(tmp_path):
    with pytest.raises(BadInput, match=r"a\.mp3.*\*\.wav or \*\.flac"):
        audio.save_wav(tmp_path / "a.mp3", torch.zeros(10), 24000)
    with pytest.raises(ValueError, match="NaN"):
        audio.save_wav(tmp_path / "a.wav", torch.tensor([0.0, torch.nan]), 24000)
    assert not list(tmp_path.iterdir())
