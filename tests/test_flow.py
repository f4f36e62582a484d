"""The flow: every number recorded from the reference, and that a row does not depend on its batch."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.cfm import CausalConditionalCFM, fixed_noise
from cosyvoice_ft.models.conformer import UpsampleConformerEncoder
from cosyvoice_ft.models.flow import CausalMaskedDiffWithXvec, collate
from cosyvoice_ft.models.mask import attention_mask, padding_mask
from cosyvoice_ft.models.unet import CausalConditionalDecoder

FILE = "flow_cv2.npz"
MODES = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(scope="module")
def record(goldens: Path) -> dict:
    return json.loads((goldens / "flow_cv2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def arrays(goldens: Path) -> dict[str, Tensor]:
    with np.load(goldens / FILE) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def build(goldens: Path, record: dict):
    """build(**settings): a new copy of the recorded small model in eval mode."""

    def make(**settings) -> CausalMaskedDiffWithXvec:
        estimator, cfm = record["config"]["estimator"], record["config"]["cfm"]
        settings = {
            "chunk_size": record["config"]["encoder"]["static_chunk_size"],
            "estimator_num_heads": estimator["num_heads"],
            "sigma_min": cfm["sigma_min"],
            "inference_cfg_rate": cfm["inference_cfg_rate"],
        } | settings
        weights = load_file(goldens / "flow_cv2.weights.safetensors")
        return CausalMaskedDiffWithXvec.from_weights(weights, **settings).eval()

    return make


@pytest.fixture(scope="module")
def recorded(build) -> CausalMaskedDiffWithXvec:
    """The model as it was recorded: the look-ahead of shorter rows reads embedded padding."""
    return build(embedded_padding=True)


@pytest.fixture(scope="module")
def model(build) -> CausalMaskedDiffWithXvec:
    return build()


def flags(value: bool, rows: int) -> Tensor:
    return torch.full((rows,), value)


# ------------------------------------------------------------------------------------------------------------- names


def test_names_and_shapes_of_the_released_model(goldens):
    rows = (line.split("\t") for line in (goldens / "keys/flow_cv2.tsv").read_text(encoding="utf-8").splitlines())
    expected = {name: tuple(int(n) for n in shape.split("x")) for name, shape, _ in rows}
    with torch.device("meta"):
        decoder = CausalConditionalCFM(estimator=CausalConditionalDecoder())
        model = CausalMaskedDiffWithXvec(encoder=UpsampleConformerEncoder(), decoder=decoder)
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == expected

    weights = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    again = CausalMaskedDiffWithXvec.from_weights(weights)
    assert repr(again) == repr(model)
    assert not list(again.buffers())


def test_foreign_weights_are_refused(goldens):
    weights = load_file(goldens / "flow_cv2.weights.safetensors")
    without = {name: weight for name, weight in weights.items() if not name.startswith("encoder.")}
    with pytest.raises(BadInput, match="flow weights: no tensor .* give the flow.pt"):
        CausalMaskedDiffWithXvec.from_weights(without)
    with pytest.raises(RuntimeError, match="epoch"):
        CausalMaskedDiffWithXvec.from_weights(weights | {"epoch": torch.tensor(1)})


# ------------------------------------------------------------------------------------------------------------- masks


def test_masks(arrays, compare):
    lens = arrays["batch.speech_feat_len"]
    compare(FILE, "enc.mask", padding_mask(lens, 114)[:, None], arrays["enc.mask"])

    visible = attention_mask(padding_mask(torch.tensor([5, 3]), 5), torch.tensor([True, False]), 2)
    chunks = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible.int().tolist() == [chunks, [[1, 1, 1, 0, 0]] * 5]
    assert visible.any(dim=2).all()  # no query without a key


# ----------------------------------------------------------------------------------------------------------- encoder


def test_speaker(recorded, arrays, compare):
    compare(FILE, "spk_proj", recorded.speaker(arrays["batch.embedding"]), arrays["spk_proj"], atol=5e-5)


@MODES
def test_encoder(recorded, arrays, compare, streaming):
    token, token_len = arrays["batch.speech_token"], arrays["batch.speech_token_len"]
    x = recorded.input_embedding(token) * padding_mask(token_len, token.shape[1])[..., None]
    h, frames = recorded.encoder(x, token_len, flags(streaming, 2))
    name = f"enc.out_streaming{streaming:d}"
    compare(FILE, name, h, arrays[name], atol=5e-5)
    compare(FILE, "batch.speech_feat_len", frames, arrays["batch.speech_feat_len"])

    x, token_len = x[1:, : token_len[1]], token_len[1:]
    h, frames = recorded.encoder(x, token_len, flags(streaming, 1), finalize=False)
    name = f"enc.ctx_out_streaming{streaming:d}"
    compare(FILE, name, h, arrays[name], atol=5e-5)
    assert frames.tolist() == [h.shape[1]]


def test_mu(recorded, arrays, compare):
    mu, _ = recorded.encode(arrays["batch.speech_token"], arrays["batch.speech_token_len"], flags(False, 2))
    compare(FILE, "mu_streaming0_row0", mu[0].T, arrays["mu_streaming0_row0"], atol=5e-5)


# --------------------------------------------------------------------------------------------------------- estimator


@MODES
@pytest.mark.parametrize("case", ["a", "b"])
def test_estimator(recorded, arrays, compare, case, streaming):
    inputs = [arrays[f"est.{case}.{name}"] for name in ("x", "mask", "mu", "t", "spks", "cond")]
    name = f"est.{case}.out_streaming{streaming:d}"
    compare(FILE, name, recorded.decoder.estimator(*inputs, flags(streaming, 2)), arrays[name], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- training


def recorded_batch(arrays: dict[str, Tensor], case: dict, rows: int = 2) -> dict[str, Tensor]:
    """Arguments of `forward` in a recorded training case, with the draws that were made then."""
    coins = iter(case["coins"])
    draws = iter(case["prompt_len_draws"])
    streaming = next(coins) < 0.5
    batch = {name.removeprefix("batch."): x[:rows] for name, x in arrays.items() if name.startswith("batch.")}
    return batch | {
        "streaming": flags(streaming, rows),
        "prompt_len": torch.tensor([0 if coin < 0.5 else next(draws) for coin in coins]),
        "t": torch.tensor(case["t"]),
        "z": arrays["train.z"][:rows].transpose(1, 2),
        "keep": torch.tensor(case["cfg_uniform"]) > 0.2,
    }


def watch(estimator: nn.Module, calls: list) -> torch.utils.hooks.RemovableHandle:
    """Append (inputs, output) of each call of the estimator to `calls`."""
    return estimator.register_forward_hook(lambda module, inputs, output: calls.append((inputs, output)))


@pytest.mark.parametrize("name", ["full", "stream", "cfgdrop"])
def test_training(recorded, record, arrays, compare, name):
    case, calls = record["training"][name], []
    batch = recorded_batch(arrays, case)
    compare(FILE, f"train.{name}.t", batch["t"], arrays[f"train.{name}.t"].flatten())
    compare(FILE, f"train.{name}.cfg_u", batch["keep"], arrays[f"train.{name}.cfg_u"] > 0.2)

    recorded.zero_grad()
    handle = watch(recorded.decoder.estimator, calls)
    out = recorded(**batch)
    handle.remove()
    loss = out["loss"] / (80 * batch["speech_feat_len"].sum())
    loss.backward()
    compare("flow_cv2.json", f"training.{name}.loss", loss, case["loss"], rtol=1e-5)

    ((_, mask, _, _, _, cond, _), pred) = calls[0]
    for array, ours in {"pred": pred, "cond": cond, "mask": mask}.items():
        if f"train.{name}.{array}" in arrays:
            compare(FILE, f"train.{name}.{array}", ours, arrays[f"train.{name}.{array}"], atol=1e-4)

    grads = {key: weight.grad for key, weight in recorded.named_parameters()}
    assert [key for key, grad in grads.items() if grad is None] == case["no_grad_params"]
    total = torch.stack([grad.norm() for grad in grads.values()]).norm()
    compare("flow_cv2.json", f"training.{name}.total_grad_norm", total, case["total_grad_norm"], rtol=1e-4)
    assert grads.keys() == case["grad_norm"].keys()
    for key, expected in case["grad_norm"].items():
        # a bias of the keys adds the same to all scores of a query: its gradient is 0, recorded as noise of 1e-10
        atol = 1e-8 if key.endswith("linear_k.bias") else 0.0
        compare("flow_cv2.json", f"training.{name}.grad_norm.{key}", grads[key].norm(), expected, rtol=1e-4, atol=atol)


def test_training_on_one_row(model, record, arrays, compare):
    case = record["training"]["row0_alone"]
    batch = recorded_batch(arrays, case, rows=1)
    loss = model(**batch)["loss"] / (80 * batch["speech_feat_len"].sum())
    compare("flow_cv2.json", "training.row0_alone.loss", loss, case["loss"], rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- synthesis


def speak(model: CausalMaskedDiffWithXvec, arrays: dict[str, Tensor], prompt: bool = True, **options) -> Tensor:
    mel, frames = model.inference(
        token=arrays["inf.token"],
        prompt_token=arrays["inf.prompt_token"][:, : None if prompt else 0],
        prompt_feat=arrays["inf.prompt_feat"][:, : None if prompt else 0],
        embedding=arrays["inf.embedding"],
        **options,
    )
    assert frames.tolist() == [mel.shape[2]]
    return mel


@MODES
@pytest.mark.parametrize("finalize", [False, True])
def test_inference(model, record, arrays, compare, streaming, finalize):
    mode = f"streaming{streaming:d}_finalize{finalize:d}"
    mel = speak(model, arrays, streaming=streaming, finalize=finalize)
    compare(FILE, f"inf.mel_{mode}", mel, arrays[f"inf.mel_{mode}"], atol=2e-4)
    assert list(mel.shape) == record["inference"][mode]


def test_inference_without_prompt(model, arrays, compare):
    compare(FILE, "inf.mel_noprompt", speak(model, arrays, prompt=False), arrays["inf.mel_noprompt"], atol=2e-4)


def test_noise(record, arrays, compare):
    noise, expected = fixed_noise(), record["rand_noise"]
    assert list(noise.shape) == expected["shape"]
    assert hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest() == expected["sha256_float32_le"]
    head = arrays["rand_noise_head"]
    compare(FILE, "rand_noise_head", noise[..., : head.shape[2]], head)


def test_too_short_and_too_long_are_refused(model):
    speaker, silence, none = torch.ones(1, 192), [torch.zeros(0, 80)], [torch.zeros(0, dtype=torch.int64)]
    for tokens, finalize in ((0, True), (3, False), (7501, True)):
        token = [torch.zeros(tokens, dtype=torch.int64)]
        with pytest.raises(BadInput, match=f"flow: {tokens} tokens"):
            model.inference(token=token, prompt_token=none, prompt_feat=silence, embedding=speaker, finalize=finalize)


# ------------------------------------------------------------------------------------------------- rows and batches


def utterance(rng: np.random.Generator, tokens: int, extra_frames: int = 0) -> dict:
    return {
        "utt": f"utt-{tokens}",
        "speech_token": rng.integers(0, 243, tokens).astype(np.int16),
        "speech_feat": rng.standard_normal((2 * tokens + extra_frames, 80)).astype(np.float16),
        "embedding": rng.standard_normal(192).astype(np.float32),
    }


def generators(rows: int) -> list[np.random.Generator]:
    return [np.random.default_rng((7, row)) for row in range(rows)]


def test_collate():
    rng = np.random.default_rng(0)
    rows = [utterance(rng, 12, extra_frames=2), utterance(rng, 31), utterance(rng, 9, extra_frames=-3)]
    batch = collate(rows, generators(3))
    assert batch["speech_token_len"].tolist() == [12, 31, 7]
    assert batch["speech_feat_len"].tolist() == [24, 62, 14]
    assert batch["speech_token"].shape == (3, 31) and batch["speech_token"].dtype == torch.int64
    assert batch["speech_feat"].shape == batch["z"].shape == (3, 62, 80)
    np.testing.assert_array_equal(batch["speech_feat"][2, :14], rows[2]["speech_feat"][:14])
    assert not batch["speech_token"][2, 7:].any() and not batch["speech_feat"][2, 14:].any()
    assert (batch["prompt_len"] <= 0.3 * batch["speech_feat_len"]).all()

    alone = collate(rows[2:], generators(3)[2:])
    assert batch.pop("count") == 80 * (24 + 62 + 14) and alone.pop("count") == 80 * 14
    for name, value in alone.items():
        whole = batch[name][2:, : value.shape[1]] if value.dim() > 1 else batch[name][2:]
        assert torch.equal(value, whole), name


def test_fixing_streaming_leaves_the_other_draws():
    rng = np.random.default_rng(0)
    rows = [utterance(rng, 10) for _ in range(40)]
    drawn, fixed = collate(rows, generators(40)), collate(rows, generators(40), streaming=True)
    assert fixed["streaming"].all() and 8 < drawn["streaming"].sum() < 32
    assert 20 < drawn["keep"].sum() < 40 and drawn["prompt_len"].bool().any() and not drawn["prompt_len"].all()
    for name in drawn.keys() - {"streaming", "count"}:
        assert torch.equal(drawn[name], fixed[name]), name


def loss_and_count(model, batch):
    count = batch.pop("count")
    return torch.stack([model(**batch)["loss"].detach(), torch.tensor(count)])


def test_batch_is_the_sum_of_its_rows(model):
    """Streaming and full rows of different lengths in one batch: each contributes what it does alone."""
    rng = np.random.default_rng(1)
    rows = [utterance(rng, tokens) for tokens in (30, 52, 4)]
    batch = collate(rows, generators(3)) | {"streaming": torch.tensor([True, False, True])}
    together, alone = loss_and_count(model, batch), []
    for row in range(3):
        one = collate(rows[row : row + 1], generators(3)[row : row + 1], streaming=row != 1)
        alone.append(loss_and_count(model, one))
    torch.testing.assert_close(together, torch.stack(alone).sum(0), rtol=1e-5, atol=0)


@MODES
@pytest.mark.parametrize("finalize", [False, True])
def test_padded_row_is_the_row_alone(model, arrays, streaming, finalize):
    options = {"streaming": streaming, "finalize": finalize}
    token, prompt, feat = arrays["inf.token"][0], arrays["inf.prompt_token"][0], arrays["inf.prompt_feat"][0]
    rows = {
        "token": [token, token[:20], token[5:25]],
        "prompt_token": [prompt, prompt[:0], prompt[:9]],
        "prompt_feat": [feat, feat[:0], feat[:18]],
        "embedding": arrays["inf.embedding"] * torch.tensor([[1.0], [-1.0], [0.5]]),
    }
    mel, frames = model.inference(**rows, **options)
    for row, length in enumerate(frames):
        alone, (frames_alone,) = model.inference(**{k: v[row : row + 1] for k, v in rows.items()}, **options)
        assert length == frames_alone == alone.shape[2]
        torch.testing.assert_close(mel[row, :, :length], alone[0], atol=1e-4, rtol=0)
        assert not mel[row, :, length:].any()


def test_streaming_encoder_knows_only_its_chunk(model, arrays):
    """Frames of a stream are the same early and at the end: what follows chunk and look-ahead cannot be seen."""
    token = arrays["batch.speech_token"][:1]
    early, _ = model.encode(token[:, :28], torch.tensor([28]), flags(True, 1), finalize=False)
    late, _ = model.encode(token, torch.tensor([57]), flags(True, 1))
    torch.testing.assert_close(late[..., :50], early, atol=5e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------- precision


def test_bfloat16_autocast(build):
    """Half precision changes the loss by its rounding only; loss and gradients stay float32 and finite."""
    rng = np.random.default_rng(2)
    model, batch = build(), collate([utterance(rng, 30), utterance(rng, 12)], generators(2))
    del batch["count"]
    exact = model(**batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_dropout_is_where_training_is(build):
    model, rng = build(), np.random.default_rng(3)
    batch = collate([utterance(rng, 20)], generators(1))
    del batch["count"]
    assert model(**batch)["loss"] == model(**batch)["loss"]
    model.train()
    assert model(**batch)["loss"] != model(**batch)["loss"]
    assert model.decoder.estimator.mid_blocks[0][1][0].ff.net[1].p == 0.0
