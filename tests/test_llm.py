"""The language model: packing, decoding with the cache, draws. The recorded numbers are in test_parity.py."""

import numpy as np
import torch

from cosyvoice_ft.models.llm import SPEECH, Layout, Qwen2LM, Request, collate
from cosyvoice_ft.models.qwen2 import Cache, Qwen2ForCausalLM, sizes_of


def test_draws_do_not_depend_on_the_batch():
    """A row's layout follows from its own generator, whatever stands beside it."""
    layout, rng = Layout(), np.random.default_rng(0)
    rows = [{"text_token": rng.integers(0, 9, 7), "speech_token": rng.integers(0, 9, 30)} for _ in range(8)]
    together = collate(rows, [np.random.default_rng(i) for i in range(8)], layout=layout)
    for i, row in enumerate(rows):
        alone = collate([row], [np.random.default_rng(i)], layout=layout)
        assert torch.equal(together["index"][i, : alone["index"].shape[1]], alone["index"][0])


def small_model(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    qwen = Qwen2ForCausalLM(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return Qwen2LM(qwen=qwen, speech_token_size=27).eval()


def test_decoding_with_the_cache_is_a_full_causal_forward():
    """Scores of every step against one forward over all that was fed, for rows of different lengths side by side."""
    model, seen = small_model(), {}

    def sampler(number):
        def sample(scores, decoded):
            seen.setdefault(number, []).append(scores.clone())
            return int(scores[:27].argmax())

        return sample

    rng = np.random.default_rng(0)

    def ids(size, n):
        return rng.integers(0, size, n).tolist()

    requests = [
        Request(ids(60, n), sampler(i), ids(60, p), ids(27, s), min_token_text_ratio=0, max_token_text_ratio=m)
        for i, (n, p, s, m) in enumerate([(5, 0, 0, 4), (9, 4, 12, 2), (3, 7, 30, 6)])
    ]
    tokens = {number: [] for number in range(len(requests))}
    for number, token in model.decode_rows(requests):
        tokens[number].append(token)
    for number, request in enumerate(requests):
        pieces = [*request.pieces(), (SPEECH, tokens[number][:-1])]
        with torch.no_grad():
            logits = model.llm_decoder(model.hidden(model.look_up(pieces)))[0].log_softmax(-1)
        ours = torch.stack(seen[number])
        torch.testing.assert_close(ours, logits[-len(ours) :], atol=1e-5, rtol=0)
        assert len(ours) == int(len(request.text) * request.max_token_text_ratio)


def test_packed_rows_are_padded_rows():
    """Nothing is computed for padding, and no row sees another: loss and gradients are those of the padded grid."""
    model, rng = small_model(), np.random.default_rng(1)
    rows = [
        {"text_token": rng.integers(0, 60, n), "speech_token": rng.integers(0, 27, s)}
        for n, s in ((3, 40), (8, 9), (1, 2), (6, 30))
    ]
    batch = collate(rows, [np.random.default_rng(i) for i in range(4)], layout=model.layout)
    count = batch.pop("count")
    packed = model(**batch)["loss"] / count
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    states = model.hidden(model.embed(batch["kind"], batch["index"])).flatten(0, 1)[batch["target_position"]]
    padded = torch.nn.functional.cross_entropy(model.llm_decoder(states), batch["target"])
    padded.backward()
    torch.testing.assert_close(packed, padded)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_our_qwen2_is_that_of_transformers():
    from transformers import Qwen2Config
    from transformers import Qwen2ForCausalLM as Theirs

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {**sizes, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    theirs = Theirs(Qwen2Config.from_dict(config)).eval()
    ours = Qwen2ForCausalLM(**sizes_of(config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    xs, cache = torch.randn(2, 11, 32), Cache()
    with torch.no_grad():
        cache.feed(2, 11, xs.device)
        expected = theirs.model(inputs_embeds=xs).last_hidden_state
        torch.testing.assert_close(ours.model(xs, cache), expected, atol=1e-5, rtol=0)
