"""From shards to batches: planned before the epoch, the same whatever the number of workers.

Plan of an epoch: row groups in an order drawn from (seed, epoch); windows of 16 groups; within a window utterances
sorted by cost and cut into batches of at most `max_batch` padded positions; the window's batches shuffled. Every rank
gets the same number of batches; no utterance is repeated or dropped.

Every random draw of an utterance comes from a generator keyed by (seed, epoch, utterance), so what is drawn does not
depend on batching, ranks, or workers.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.shards import Shards

WINDOW = 16  # row groups (of 64) sorted together
CV_EPOCH = 2**32 - 1  # the key of draws that are the same after every epoch


def plan(
    costs: np.ndarray,
    groups: Sequence[tuple[int, int]],
    *,
    max_batch: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    world_size: int = 1,
) -> list[np.ndarray]:
    """Return the batches of an epoch, each an array of utterance numbers; rank r takes batches[r::world_size].

    costs (U,) positions an utterance; groups: (first utterance, number of utterances) of each row group.
    A longer utterance than `max_batch` stands alone.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(groups)) if shuffle else np.arange(len(groups))
    batches = []
    for start in range(0, len(order), WINDOW):
        rows = np.concatenate(
            [np.arange(first, first + n) for first, n in (groups[g] for g in order[start : start + WINDOW])]
        )
        jitter = rng.uniform(0.98, 1.02, len(rows)) if shuffle else 1.0  # other neighbours every epoch
        rows = rows[np.argsort(costs[rows] * jitter, kind="stable")]
        window = _cut(rows, costs, max_batch)
        batches += [window[i] for i in rng.permutation(len(window))] if shuffle else window
    return _divisible(batches, world_size)


def _cut(rows: np.ndarray, costs: np.ndarray, max_batch: int) -> list[np.ndarray]:
    """Cut sorted rows where (longest cost) * (number of rows) would exceed `max_batch`."""
    batches, start, longest = [], 0, 0
    for i, row in enumerate(rows):
        longest = max(longest, costs[row])
        if i > start and longest * (i - start + 1) > max_batch:
            batches.append(rows[start:i])
            start, longest = i, costs[row]
    return [*batches, rows[start:]]


def _divisible(batches: list[np.ndarray], world_size: int) -> list[np.ndarray]:
    """Halve the batches with most utterances until every rank gets the same number."""
    while len(batches) % world_size:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        rows = batches[largest]
        if len(rows) < 2:
            raise BadInput(f"{sum(map(len, batches))} utterances cannot be dealt to {world_size} processes; use fewer")
        batches[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return batches


def padding_share(batches: Sequence[np.ndarray], costs: np.ndarray) -> float:
    """Return the share of positions that are padding."""
    padded = sum(costs[rows].max() * len(rows) for rows in batches)
    return 1 - sum(costs[rows].sum() for rows in batches) / padded


class Batches(Dataset):
    """Planned batches, read and collated on demand.

    An item is collate(rows, rngs) and, beside the tensors: `rows` (utterance numbers), `epoch`, `utts` (their ids),
    `positions` (sum of their costs), `padded` (longest cost * rows).
    """

    def __init__(
        self,
        shards: Shards,
        batches: Sequence[np.ndarray],
        collate: Callable,
        costs: np.ndarray,
        *,
        with_mel: bool,
        seed: int,
        epoch: int,
    ) -> None:
        self.shards, self.batches, self.collate, self.costs = shards, batches, collate, costs
        self.with_mel, self.seed, self.epoch = with_mel, seed, epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict:
        return self.batch(self.batches[number])

    def batch(self, numbers: np.ndarray) -> dict:
        """Read and collate these utterances."""
        rows = [self.row(int(i)) for i in numbers]
        keys = [zlib.crc32(row["utt"].encode()) for row in rows]
        rngs = [np.random.default_rng([self.seed, self.epoch, key]) for key in keys]
        costs = self.costs[numbers]
        facts = {"rows": numbers.tolist(), "epoch": self.epoch, "utts": [row["utt"] for row in rows]}
        facts |= {"positions": int(costs.sum()), "padded": int(costs.max()) * len(costs)}
        return self.collate(rows, rngs) | facts

    def row(self, i: int) -> dict:
        """Return utterance i as utt, text_token, speech_token, embedding (192,) and, if asked for, speech_feat."""
        shards = self.shards
        row = {
            "utt": shards.utt[i],
            "text_token": shards.text_token[i],
            "speech_token": shards.speech_token[i],
            "embedding": shards.spk_embedding[i],
        }
        return row | {"speech_feat": shards.speech_feat(i)} if self.with_mel else row


def load(batches: Batches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Return the batches in their planned order, read ahead by `num_workers` processes."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(num_workers, len(batches)),
        pin_memory=pin_memory,
        multiprocessing_context="fork" if num_workers and len(batches) else None,
        generator=torch.Generator(),
    )
