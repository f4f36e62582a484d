"""A trained thing is tested by what it does: four clips, learnt by heart, must come back."""

import numpy as np
import pytest
import torch

from cosyvoice_ft import audio, conf, engine
from cosyvoice_ft.extractors import SpeakerEncoder, SpeechTokenizer, load_for_extraction
from cosyvoice_ft.models import flow, llm
from cosyvoice_ft.synthesis import load_model
from cosyvoice_ft.text import Tokenizer

CLIPS = ("demo_019", "demo_037", "demo_055", "demo_073")


@pytest.fixture(scope="module")
def rows(root, tiny_base):
    """Four utterances of the shipped recordings, as training reads them; cut to 2 s to be quick."""
    texts = dict(line.split("|")[:2] for line in (root / "local/demo/metadata.csv").read_text().splitlines())
    tokenizer = Tokenizer(tiny_base)
    to_tokens = SpeechTokenizer(tiny_base / "speech_tokenizer_v2.onnx", ["CPUExecutionProvider"])
    to_vector = SpeakerEncoder(tiny_base / "campplus.onnx", ["CPUExecutionProvider"])
    found = []
    for utt in CLIPS:
        wav24, wav16 = load_for_extraction(root / f"local/demo/wavs/{utt}.flac")
        wav24, wav16 = wav24[: 2 * audio.SAMPLE_RATE], wav16[: 2 * 16000]
        found.append(
            {
                "utt": utt,
                "text_token": np.array(tokenizer.encode(texts[utt])),
                "speech_token": to_tokens(wav16),
                "embedding": to_vector(wav16),
                "speech_feat": audio.log_mel(wav24).numpy().astype(np.float16),
            }
        )
    return found


SETTINGS = {
    "engine": "torch_ddp", "optimizer": "adamw", "lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0,
    "grad_clip": 5.0, "dtype": "fp32", "compile": False,
}  # fmt: skip


def rngs(n, step):
    return [np.random.default_rng([step, i]) for i in range(n)]


def update(machine, batch, lr):
    """One update with one batch; return the sums of its losses."""
    machine.module.train()
    out = machine.forward(batch)
    machine.backward(out["loss"] / batch["count"])
    machine.update(lr)
    return out


def test_language_model_says_the_clips_back(rows, tiny_base):
    model = load_model("llm", tiny_base, conf.load_conf(conf.CONF_DIR / "cosyvoice2.yaml"))
    machine = engine.make_engine(model, SETTINGS, torch.device("cpu"))
    for step in range(150):
        batch = llm.collate(rows, rngs(4, step), layout=model.layout)
        sums = update(machine, batch, 3e-3)
        if sums["hits"] == batch["count"] and sums["loss"] / batch["count"] < 0.05:
            break
    model.eval()
    for row in rows:
        text = row["text_token"].tolist()
        greedy = {"sample": lambda scores, decoded: int(scores.argmax()), "min_token_text_ratio": 0}  # clips are cut
        spoken = model.decode(text, **greedy)
        assert list(spoken) == row["speech_token"].tolist(), f"{row['utt']} after {step + 1} updates"


def mel_of(model, row):
    mel, _ = model.inference(
        token=[torch.from_numpy(row["speech_token"]).long()],
        prompt_token=[torch.zeros(0, dtype=torch.long)],
        prompt_feat=[torch.zeros(0, 80)],
        embedding=torch.from_numpy(row["embedding"])[None],
    )
    return mel[0].T  # (T, 80)


def test_flow_draws_the_clips_again(rows, tiny_base):
    model = load_model("flow", tiny_base, conf.load_conf(conf.CONF_DIR / "cosyvoice2.yaml", ["--flow.dropout_rate=0"]))
    clips = torch.stack([torch.from_numpy(row["speech_feat"]).float() for row in rows])
    distance = lambda mel: (mel[None] - clips).abs().mean((1, 2))  # noqa: E731 -> (4,)
    untrained = [distance(mel_of(model.eval(), row)) for row in rows]
    machine = engine.make_engine(model, SETTINGS, torch.device("cpu"))
    for step in range(250):
        update(machine, flow.collate(rows, rngs(4, step)), 2e-3)
    for i, row in enumerate(rows):
        trained = distance(mel_of(model.eval(), row))
        assert trained.argmin() == i, f"{row['utt']} is nearest to {CLIPS[int(trained.argmin())]}: {trained.tolist()}"
        assert trained[i] < 0.5 * untrained[i][i], f"{row['utt']}: L1 {trained[i]:.2f}, untrained {untrained[i][i]:.2f}"
