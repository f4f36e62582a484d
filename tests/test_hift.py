"""The vocoder against the recorded numbers of the reference, and the files it has to read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.hift import HiFTGenerator

NPZ, JSON = "hift_cv2.npz", "hift_cv2.json"
DECODE_TOLERANCE, WAV_TOLERANCE = 1e-5, 5e-3  # amplitude; an f0 off by a rounding error moves the phase


@pytest.fixture(scope="module")
def arrays(goldens):
    with np.load(goldens / NPZ) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def recorded(goldens):
    return json.loads((goldens / JSON).read_text(encoding="utf-8"))


@pytest.fixture
def weights(goldens):
    return load_file(goldens / "hift_cv2.weights.safetensors")


@pytest.fixture
def model(weights):
    return HiFTGenerator.from_weights(weights)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def test_weights_survive_a_round_trip(model, arrays, recorded, no_grad):
    names = ("upsample_rates", "resblock_dilation_sizes", "source_resblock_dilation_sizes", "audio_limit")
    settings = {name: recorded["config"][name] for name in names}
    again = HiFTGenerator.from_weights(model.state_dict(), **settings)
    assert again.state_dict().keys() == recorded["state_dict_keys"].keys()
    for name, shape in recorded["state_dict_keys"].items():
        assert list(again.state_dict()[name].shape) == shape
        assert torch.equal(again.state_dict()[name], model.state_dict()[name]), name
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    assert torch.equal(again.decode(arrays["mel"], arrays["source"]), model.decode(arrays["mel"], arrays["source"]))


@pytest.mark.parametrize("prefix", ["", "generator."])
def test_older_weight_norm_names_and_gan_checkpoints_load(weights, prefix):
    older = {}
    for name, tensor in weights.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        older[prefix + name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    assert f"{prefix}ups.0.weight_g" in older
    older["discriminator.mpd.0.bias"] = torch.zeros(1)
    state = HiFTGenerator.from_weights(older).state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_weights_of_something_else_are_refused(weights):
    with pytest.raises(BadInput, match="no conv_pre"):
        HiFTGenerator.from_weights({"llm_decoder.weight": torch.zeros(3, 3)})
    name = "conv_pre.parametrizations.weight.original1"
    with pytest.raises(BadInput, match="kernel 5"):  # CosyVoice3
        HiFTGenerator.from_weights({**weights, name: weights[name][..., :5]})
    del weights["conv_post.bias"]
    with pytest.raises(RuntimeError, match="conv_post.bias"):
        HiFTGenerator.from_weights(weights)


def test_folded_weights_sound_the_same(model, arrays, no_grad):
    unfolded = model.decode(arrays["mel"], arrays["source"])
    model.fold_weight_norm()
    assert not any("parametrizations" in name for name in model.state_dict())
    torch.testing.assert_close(model.decode(arrays["mel"], arrays["source"]), unfolded, atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [(40, 25, 1, 13), (7, 7), (1,)])
def test_a_row_of_a_batch_is_the_row_alone(model, no_grad, frames):
    draw = torch.Generator().manual_seed(0)
    mel = 3 * torch.randn(len(frames), 80, max(frames), generator=draw)  # what lies in the padding is of no account
    noise = torch.randn(len(frames), model.hop * max(frames), 9, generator=draw)
    wav, source = model(mel, noise, torch.tensor(frames))
    for i, n in enumerate(frames):
        samples = model.hop * n
        mel_alone, source_alone = mel[i : i + 1, :, :n], source[i : i + 1, :, :samples]
        wav_alone, _ = model(mel_alone, noise[i : i + 1, :samples])
        assert wav_alone.abs().max() > 0.1
        torch.testing.assert_close(wav[i, :samples], wav_alone[0], atol=WAV_TOLERANCE, rtol=0)
        decoded = model.decode(mel_alone, source_alone)[0]
        torch.testing.assert_close(wav[i, :samples], decoded, atol=DECODE_TOLERANCE, rtol=0)
        assert not wav[i, samples:].any()


def test_noise_comes_from_the_generator_of_each_row(model):
    def drawn(frames, seeds):
        return model.draw_noise(frames, [torch.Generator().manual_seed(seed) for seed in seeds])

    both = drawn([3, 5], [1, 2])
    assert both.shape == (2, 5 * model.hop, 9) and not both[0, 3 * model.hop :].any()
    assert torch.equal(both[0, : 3 * model.hop], drawn([3], [1])[0]) and torch.equal(both[1], drawn([5], [2])[0])
    assert not torch.equal(drawn([5], [1])[0], both[1])


def test_harmonics_keep_their_phase_over_half_a_minute(model):
    """The last second of 30 s at 220 Hz, against float64 from end to end; float32 would be off by 1.5e-3 rms."""
    frames, hop, source = 1500, model.hop, model.m_source
    f0 = 220 * np.exp(0.15 * np.sin(np.arange(frames) / 30)).astype(np.float32)
    sines = source.sines(torch.from_numpy(f0)[None], torch.zeros(1, frames * hop, 9))[0, -50 * hop :].numpy()
    centres, samples = (np.arange(frames) + 0.5) * hop - 0.5, np.arange(frames * hop)[-50 * hop :]
    for number in range(9):
        turns = np.cumsum(f0.astype(np.float64) * (number + 1) / source.sampling_rate) * hop
        expected = source.alpha * np.sin(2 * np.pi * np.interp(samples, centres, turns))
        assert np.sqrt(np.mean((sines[:, number] - expected) ** 2)) < 1e-4, number


def test_source_is_float32_under_autocast(model, arrays, no_grad):
    f0, source = model.predict_f0(arrays["mel"]), model.source(arrays["f0"], arrays["sine_noise"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.predict_f0(arrays["mel"]), f0)
        assert torch.equal(model.source(arrays["f0"], arrays["sine_noise"]), source)
        wav, _ = model(arrays["mel"], arrays["sine_noise"])
    assert wav.dtype == torch.float32
