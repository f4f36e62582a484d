"""The language model against recorded numbers: sequences, logits, losses, gradients, decoding, sampling."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosyvoice_ft.models.llm import Layout, Qwen2LM, collate


@pytest.fixture(scope="module")
def recorded(goldens):
    """(json, arrays, model) of llm_cv2."""
    facts = json.loads((goldens / "llm_cv2.json").read_text())
    arrays = np.load(goldens / "llm_cv2.npz")
    weights = load_file(goldens / "llm_cv2.weights.safetensors")
    model = Qwen2LM.from_weights(weights, qwen_config=facts["qwen2_config"], mix_ratio=facts["mix_ratio"])
    return facts, arrays, model.eval()


class Coin:
    """A generator whose only draw is known."""

    def __init__(self, value: float) -> None:
        self.random = lambda: value


def batch_of(facts, arrays, case):
    rows = [
        {"text_token": text[:n], "speech_token": speech[:s]}
        for text, n, speech, s in zip(
            *(arrays[f"batch.{key}"] for key in ("text_token", "text_token_len", "speech_token", "speech_token_len")),
            strict=True,
        )
    ]
    coins = [Coin(value) for value in facts["training"]["coins"][case]]
    layout = Layout(facts["speech_token_size"], tuple(facts["mix_ratio"]))
    return collate(rows, coins, layout=layout)


def test_draws_do_not_depend_on_the_batch(recorded):
    """A row's layout follows from its own generator, whatever stands beside it."""
    facts, _, _ = recorded
    layout = Layout(facts["speech_token_size"])
    rng = np.random.default_rng(0)
    rows = [{"text_token": rng.integers(0, 9, 7), "speech_token": rng.integers(0, 9, 30)} for _ in range(8)]
    together = collate(rows, [np.random.default_rng(i) for i in range(8)], layout=layout)
    for i, row in enumerate(rows):
        alone = collate([row], [np.random.default_rng(i)], layout=layout)
        assert torch.equal(together["index"][i, : alone["index"].shape[1]], alone["index"][0])
