"""The flow: every number recorded from the reference, and that a row does not depend on its batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.attention import attend
from cosyvoice_ft.models.cfm import CausalConditionalCFM
from cosyvoice_ft.models.conformer import UpsampleConformerEncoder
from cosyvoice_ft.models.flow import CausalMaskedDiffWithXvec, collate
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


# --------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kind", ["seen", "additive", "causal"])
def test_attention_in_bfloat16_on_a_cpu(kind):
    """The written-out sum is the fused one to the rounding of bfloat16, gradients too, and sees no more."""
    torch.manual_seed(0)
    seen = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril(3)
    additive = torch.randn(2, 4, 40, 40).masked_fill(~seen, -torch.inf)
    mask = {"seen": seen, "additive": additive, "causal": None}[kind]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(2, 4, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
        q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = attend(q, k, v, mask)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        found[dtype] = [x.float() for x in (y, q.grad, k.grad, v.grad)]
        unseen = attend(q, k, v.detach().index_fill(2, torch.tensor([39]), 1e4), mask)
        torch.testing.assert_close(unseen[:, :, :36], y[:, :, :36], rtol=0, atol=0)
    for close, exact in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        assert (close - exact).norm() < 0.01 * exact.norm()


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
