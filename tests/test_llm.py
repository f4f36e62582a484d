"""The language model against recorded numbers: sequences, logits, losses, gradients, decoding, sampling."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosyvoice_ft.models.llm import NO_TARGET, Layout, Qwen2LM, collate, smoothed_loss
from cosyvoice_ft.models.qwen2 import Qwen2ForCausalLM
from cosyvoice_ft.models.sampling import nucleus, ras_sampling


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


def test_released_names_and_shapes(goldens):
    with torch.device("meta"):
        model = Qwen2LM(qwen=Qwen2ForCausalLM())
    with open(goldens / "keys" / "llm_cv2.tsv", newline="") as file:
        table = {name: shape for name, shape, _ in csv.reader(file, delimiter="\t")}
    assert {name: "x".join(map(str, value.shape)) for name, value in model.state_dict().items()} == table


@pytest.mark.parametrize("case", ["uni", "bi", "mix"])
def test_training(recorded, compare, case):
    facts, arrays, model = recorded
    batch = batch_of(facts, arrays, case)
    count = batch.pop("count")
    shape = batch["kind"].shape
    target = torch.full((shape.numel(),), NO_TARGET)
    target[batch["target_position"]] = batch["target"]
    lengths = (batch["kind"] != 0).sum(1)
    compare("llm_cv2", f"{case}.lm_target", target.view(shape), arrays[f"{case}.lm_target"])
    compare("llm_cv2", f"{case}.lm_input_len", lengths, arrays[f"{case}.lm_input_len"])
    xs = model.embed(batch["kind"], batch["index"])
    n = int(lengths[0])
    compare("llm_cv2", f"{case}.lm_input_row0", xs[0, :n], arrays[f"{case}.lm_input_row0"][:n], atol=1e-6)
    logits = model.llm_decoder(model.hidden(xs))
    if case == "mix":
        for i, n in enumerate(lengths.tolist()):
            compare("llm_cv2", "mix.logits", logits[i, :n], arrays["mix.logits"][i, :n], atol=1e-4)
    else:
        compare("llm_cv2", f"{case}.logits_row0", logits[0, :n], arrays[f"{case}.logits_row0"][:n], atol=1e-4)

    model.zero_grad(set_to_none=True)
    out = model(**batch)
    (out["loss"] / count).backward()
    training = facts["training"]
    compare("llm_cv2", f"loss.{case}", out["loss"] / count, training["loss"][case], rtol=1e-5)
    compare("llm_cv2", f"acc.{case}", out["hits"] / count, training["acc"][case], rtol=1e-6)
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    recorded_norms = training["grad_norm"][case]
    assert norms.keys() == recorded_norms.keys()
    for name, norm in norms.items():
        compare("llm_cv2", f"grad_norm.{case}.{name}", norm, recorded_norms[name], rtol=1e-4)
    total = torch.stack(list(norms.values())).norm()
    compare("llm_cv2", f"total_grad_norm.{case}", total, training["total_grad_norm"][case], rtol=1e-4)


def test_label_smoothing(recorded, compare):
    facts, arrays, model = recorded
    batch = batch_of(facts, arrays, "mix")
    logits = torch.from_numpy(arrays["mix.logits"]).flatten(0, 1)[batch["target_position"]]
    for eps in (0.0, 0.1):
        loss = smoothed_loss(logits, batch["target"], eps)
        for kind, count in (("norm", len(logits)), ("batch", len(batch["kind"]))):
            name = f"mix_lsm{eps}_{kind}"
            if name in facts["training"]["loss"]:
                compare("llm_cv2", f"loss.{name}", loss / count, facts["training"]["loss"][name], rtol=1e-5)


def recorded_sampler(facts, name, seen):
    """The sampler a recorded case was made with (see `samplers` in the json); keeps the scores it is handed."""
    case, n = facts["inference"][name], facts["speech_token_size"]
    script, eos_after = case.get("script") or {}, case.get("eos_after")

    def sample(scores, decoded):
        seen.append(scores.clone())
        i, kind = len(decoded), case["kind"]
        finite = bool(torch.isfinite(scores[n]))
        if kind == "greedy":
            return int(scores.argmax())
        if kind == "eager_eos" and finite:
            return n
        if kind == "scripted":
            if str(i) in script:
                return script[str(i)]
            if eos_after is not None and i >= eos_after and finite:
                return n
        return int(scores[:n].argmax())

    return sample


def test_decoding(recorded, compare):
    facts, arrays, model = recorded
    for name, case in facts["inference"].items():
        seen = []
        text, prompt_text, prompt_speech = (
            arrays[f"inf.{name}.{key}"][0].tolist() for key in ("text", "prompt_text", "prompt_speech")
        )
        tokens = model.decode(
            text,
            sample=recorded_sampler(facts, name, seen),
            prompt_text=prompt_text,
            prompt_speech=prompt_speech,
            min_token_text_ratio=case.get("min_r", 2),
            max_token_text_ratio=case.get("max_r", 20),
        )
        compare("llm_cv2", f"inf.{name}.tokens", list(tokens), arrays[f"inf.{name}.tokens"])
        assert len(seen) == case["sampler_calls"]
        logp = arrays[f"inf.{name}.logp"]
        compare("llm_cv2", f"inf.{name}.logp", torch.stack(seen[: len(logp)]), logp, atol=1e-4)


def test_sampling(goldens, compare):
    facts, arrays = json.loads((goldens / "sampling.json").read_text()), np.load(goldens / "sampling.npz")
    for case in facts["cases"]:
        scores, params = torch.from_numpy(arrays[f"scores_{case['i']}"]), facts["params"][case["params"]]
        probs, ids = nucleus(scores, top_p=params["top_p"], top_k=params["top_k"])
        compare("sampling", f"kept_{case['i']}", ids, case["kept"])
        compare("sampling", f"kept_prob_{case['i']}", probs, arrays[f"kept_prob_{case['i']}"], atol=1e-6)
        uniforms = iter(case["u"])
        token = ras_sampling(scores, case["decoded"], partial(next, uniforms), **params)
        compare("sampling", f"token_{case['i']}", token, case["token"])
        assert len(list(uniforms)) == (0 if case["fallback"] else 1)


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
