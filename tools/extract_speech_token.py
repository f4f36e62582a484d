#!/usr/bin/env python3
"""Stage 2: every utterance as speech tokens, 25 a second (S3 tokenizer, speech_tokenizer_v2.onnx).

    python tools/extract_speech_token.py data/demo/train data/demo/dev --conf conf/demo.yaml

reads   DATA_DIR/wav.scp; pretrained_dir/speech_tokenizer_v2.onnx, and on a card, where it is there, its twin for
        batches, speech_tokenizer_v2.batch.onnx
writes  DATA_DIR/utt2speech_token.pt {utt: (S,) int16}, S = length of the wave padded to whole 40 ms

Goes on where it was ended, and does again what changed: recordings, or the model. Several processes share the work
when each is told RANK (0, 1, ...) and WORLD_SIZE; the last to finish joins what all have done.
"""

import time
from pathlib import Path

import numpy as np
import torch

from cosyvoice_ft import cli, conf, device, extraction
from cosyvoice_ft.extractors import CODEBOOK_SIZE, BatchSpeechTokenizer, SpeechTokenizer


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="+")
    args, overrides = cli.parse_with_conf(parser)
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    where = device.torch_device(settings["device"])
    providers = device.onnx_providers(where)
    print(device.describe(where, providers))
    torch.set_num_threads(1)  # utterances run side by side instead

    weights = Path(settings["pretrained_dir"]) / "speech_tokenizer_v2.onnx"
    batched = weights.with_suffix(".batch.onnx")
    if where.type == "cuda" and batched.is_file():
        tokenizer = BatchSpeechTokenizer(batched, providers, extraction.card(where))
    else:
        tokenizer = SpeechTokenizer(weights, providers, extraction.card(where))
    works = extraction.extract(args.data_dir, "utt2speech_token", tokenizer, weights, settings["nj"])
    if works is None:
        return

    counts = np.zeros(CODEBOOK_SIZE, np.int64)
    for tokens in (tokens for work in works for tokens in work.done.values()):
        counts += np.bincount(tokens, minlength=CODEBOOK_SIZE)
    seconds = time.monotonic() - start
    print(
        f"wrote utt2speech_token.pt {extraction.summary(works)}, {counts.sum()} tokens, "
        f"{np.count_nonzero(counts)} different ones, {seconds:.1f} s"
    )


if __name__ == "__main__":
    cli.run(main)
