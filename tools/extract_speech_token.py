#!/usr/bin/env python3
"""Stage 2: every utterance as speech tokens, 25 a second (S3 tokenizer, speech_tokenizer_v2.onnx).

    python tools/extract_speech_token.py data/demo/train data/demo/dev --conf conf/demo.yaml

reads   DATA_DIR/wav.scp; pretrained_dir/speech_tokenizer_v2.onnx
writes  DATA_DIR/utt2speech_token.pt {utt: (S,) int16}, S = length of the wave padded to whole 40 ms
"""

import time
from pathlib import Path

import numpy as np

from cosyvoice_ft import cli, conf, device, jobs
from cosyvoice_ft.extractors import SpeechTokenizer, load_for_extraction, save_archive
from cosyvoice_ft.table import read_table


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="+")
    args, overrides = cli.parse_with_conf(parser)
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    where = device.torch_device(settings["device"])
    providers = device.onnx_providers(where)
    print(device.describe(where, providers))

    wavs = {folder: read_table(folder / "wav.scp") for folder in args.data_dir}
    tokenizer = SpeechTokenizer(Path(settings["pretrained_dir"]) / "speech_tokenizer_v2.onnx", providers)

    def tokens_of(path: str) -> np.ndarray:
        return tokenizer(load_for_extraction(path)[1])

    paths = {utt: path for table in wavs.values() for utt, path in table.items()}
    tokens, failed = jobs.for_each(tokens_of, paths, what="speech tokens", nj=settings["nj"])
    jobs.settle(failed, len(paths), "utt2speech_token.pt")
    for folder in args.data_dir:
        save_archive(folder / "utt2speech_token.pt", {utt: tokens[utt] for utt in wavs[folder] if utt in tokens})
    folders, seconds = " ".join(str(folder) for folder in args.data_dir), time.monotonic() - start
    ids = np.concatenate(list(tokens.values()))
    print(
        f"wrote utt2speech_token.pt in {folders}: {len(tokens)} of {len(paths)} utterances, {len(ids)} tokens, "
        f"{len(np.unique(ids))} different ones, {seconds:.1f} s"
    )


if __name__ == "__main__":
    cli.run(main)
