"""Shards and the plan of an epoch: nothing lost, nothing twice, nothing that depends on workers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cosyvoice_ft import audio, dataset, shards
from cosyvoice_ft.conf import CONF_DIR, load_conf
from cosyvoice_ft.extractors import load_for_extraction
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.flow import collate
from cosyvoice_ft.synthesis import load_model


def made_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        s = int(rng.integers(30, 250))
        yield {
            "utt": f"u{i:04d}",
            "spk": f"s{i % 3}",
            "text": "文本",
            "text_token": rng.integers(0, 300, 1 + s // 4).astype(np.int32),
            "speech_token": rng.integers(0, 6561, s).astype(np.int16),
            "utt_embedding": rng.standard_normal(192).astype(np.float32),
            "spk_embedding": rng.standard_normal(192).astype(np.float32),
            "speech_feat": rng.standard_normal((2 * s, 80)).astype(np.float16),
        }


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(rows, data.list) of 150 utterances in two shards."""
    folder, rows = tmp_path_factory.mktemp("parquet"), list(made_rows(150))
    shards.write_shard(folder / "0.parquet", rows[:100], {"tokenizer": "abc"})
    shards.write_shard(folder / "1.parquet", rows[100:], {"tokenizer": "abc"})
    shards.write_data_list(folder / "data.list", [folder / "0.parquet", folder / "1.parquet"])
    return rows, folder / "data.list"


def test_what_was_written_is_read(packed):
    rows, data_list = packed
    found = shards.Shards(data_list, cached_groups=1)
    assert found.utt == [row["utt"] for row in rows] and found.metadata["tokenizer"] == "abc"
    assert [n for *_, n in found.groups] == [64, 36, 50]
    for i in (0, 149, 63, 64, 1, 100):
        np.testing.assert_array_equal(found.speech_feat(i), rows[i]["speech_feat"])
        np.testing.assert_array_equal(found.speech_token[i], rows[i]["speech_token"])
        np.testing.assert_array_equal(found.text_token[i], rows[i]["text_token"])
        np.testing.assert_array_equal(found.spk_embedding[i], rows[i]["spk_embedding"])
    assert len(found.cache) == 1


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "data.list").write_text("0.parquet\n")
    with pytest.raises(BadInput, match="0.parquet: not a readable shard"):
        shards.Shards(tmp_path / "data.list")
    pq.write_table(pa.table({"utt": ["a"], "speech_feat": [[1.0]]}), tmp_path / "0.parquet")
    with pytest.raises(BadInput, match="0.parquet: holds other columns than this version packs; run stage 3 again"):
        shards.Shards(tmp_path / "data.list")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_plan_deals_every_utterance_once(world_size):
    costs = np.random.default_rng(0).integers(50, 1500, 1000)
    groups = [(start, min(64, 1000 - start)) for start in range(0, 1000, 64)]
    options = {"max_batch": 8000, "seed": 1, "world_size": world_size}
    batches = dataset.plan(costs, groups, epoch=1, **options)
    assert len(batches) % world_size == 0
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert all(costs[rows].max() * len(rows) <= 8000 or len(rows) == 1 for rows in batches)
    assert dataset.padding_share(batches, costs) < 0.05
    again, other = dataset.plan(costs, groups, epoch=1, **options), dataset.plan(costs, groups, epoch=2, **options)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert {tuple(rows) for rows in batches} != {tuple(rows) for rows in other}


def test_an_utterance_above_the_limit_stands_alone():
    batches = dataset.plan(np.array([10, 5000, 20]), [(0, 3)], max_batch=100, seed=0, epoch=1)
    assert sorted(map(len, batches)) == [1, 2] and all(len(rows) for rows in batches)


def test_too_few_utterances_for_the_processes():
    with pytest.raises(BadInput, match="3 utterances cannot be dealt to 4 processes"):
        dataset.plan(np.array([10, 10, 10]), [(0, 3)], max_batch=100, seed=0, epoch=1, world_size=4)


def draws(rows, rngs):
    return {"utts": [row["utt"] for row in rows], "draw": [rng.random() for rng in rngs]}


def test_draws_belong_to_the_utterance(packed):
    """The same numbers for an utterance in any batch and by any number of workers; others in another epoch."""
    found = shards.Shards(packed[1])
    groups, costs = [(first, n) for _, _, first, n in found.groups], found.speech_token.lengths

    def drawn(max_batch, epoch, workers):
        plan = dataset.plan(costs, groups, max_batch=max_batch, seed=0, epoch=epoch)
        own = dataset.Batches(found, plan, draws, costs, with_mel=False, seed=0, epoch=epoch)
        batches = list(dataset.load(own, workers, pin_memory=False))
        return [batch["utts"] for batch in batches], {
            u: d for b in batches for u, d in zip(b["utts"], b["draw"], strict=True)
        }

    order, numbers = drawn(2000, 1, 0)
    assert drawn(2000, 1, 2) == (order, numbers)
    assert drawn(700, 1, 0)[1] == numbers and len(numbers) == 150
    assert drawn(2000, 2, 0)[1] != numbers


def test_float16_mel_is_near_enough(root, tiny_base):
    """Shards keep the log-mel as float16: |x| < 16, so the error is at most 2^-8 (half a unit in the last place), and
    the flow's loss moves by less than 0.1 %."""
    feats = [
        audio.log_mel(load_for_extraction(path)[0])
        for path in sorted((root / "local/demo/wavs").glob("*.flac"))[:8]
    ]  # fmt: skip
    for feat in feats:
        assert feat.abs().max() < 16 and (feat.half().float() - feat).abs().max() <= 2**-8
    model = load_model("flow", tiny_base, load_conf(CONF_DIR / "cosyvoice2.yaml")).eval()
    rng, losses = np.random.default_rng(0), {}
    tokens = [rng.integers(0, 6561, len(feat) // 2).astype(np.int16) for feat in feats]
    for dtype in (np.float16, np.float32):
        rows = [
            {
                "utt": "u",
                "speech_token": t,
                "speech_feat": f.numpy().astype(dtype),
                "embedding": np.ones(192, np.float32),
            }
            for t, f in zip(tokens, feats, strict=True)
        ]
        batch = collate(rows, [np.random.default_rng(i) for i in range(len(rows))])
        count = batch.pop("count")
        with torch.no_grad():
            losses[dtype] = float(model(**batch)["loss"]) / count
    assert abs(losses[np.float16] / losses[np.float32] - 1) < 1e-3
