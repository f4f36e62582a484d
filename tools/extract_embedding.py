#!/usr/bin/env python3
"""Stage 1: the voice of every utterance and of every speaker as 192 numbers (CAM++, campplus.onnx).

    python tools/extract_embedding.py data/demo/train data/demo/dev --conf conf/demo.yaml

reads   DATA_DIR/wav.scp, DATA_DIR/utt2spk; pretrained_dir/campplus.onnx
writes  DATA_DIR/utt2embedding.pt {utt: (192,) float32}
        DATA_DIR/spk2embedding.pt {spk: (192,) float32}, the mean over the speaker's utterances in all DATA_DIRs

Goes on where it was ended, and does again what changed: recordings, or the model. Several processes share the work
when each is told RANK (0, 1, ...) and WORLD_SIZE; the last to finish joins what all have done.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from cosyvoice_ft import cli, conf, device, extraction
from cosyvoice_ft.extractors import EMBEDDING_SIZE, SpeakerEncoder, save_archive
from cosyvoice_ft.table import read_table


def speaker_means(pairs: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return {spk: (192,) float32}, the mean of the vectors of each, from (spk, vector) pairs."""
    sums, counts = {}, {}
    for spk, vector in pairs:
        sums[spk] = sums.get(spk, np.zeros(EMBEDDING_SIZE)) + vector
        counts[spk] = counts.get(spk, 0) + 1
    return {spk: (sums[spk] / counts[spk]).astype(np.float32) for spk in sums}


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="+")
    args, overrides = cli.parse_with_conf(parser)
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    where = device.torch_device(settings["device"])
    providers = device.onnx_providers(where)
    print(device.describe(where, providers))
    torch.set_num_threads(1)  # utterances run side by side instead

    spks = {folder: read_table(folder / "utt2spk") for folder in args.data_dir}
    weights = Path(settings["pretrained_dir"]) / "campplus.onnx"
    encoder = SpeakerEncoder(weights, providers, extraction.card(where))
    works = extraction.extract(args.data_dir, "utt2embedding", encoder, weights, settings["nj"])
    if works is None:
        return

    means = speaker_means((spks[work.folder][utt], vector) for work in works for utt, vector in work.done.items())
    for folder in args.data_dir:
        own = sorted(means.keys() & spks[folder].values())
        extraction.sweep(folder / "spk2embedding.pt")
        save_archive(folder / "spk2embedding.pt", {spk: means[spk] for spk in own})
    seconds = time.monotonic() - start
    print(
        f"wrote utt2embedding.pt spk2embedding.pt {extraction.summary(works)}, {len(means)} speakers, {seconds:.1f} s"
    )


if __name__ == "__main__":
    cli.run(main)
