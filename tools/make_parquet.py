#!/usr/bin/env python3
"""Stage 3: pack what training reads: text ids, speech tokens, speaker vectors, log-mel.

    python tools/make_parquet.py data/demo/train data/demo/dev --conf conf/demo.yaml

reads   DATA_DIR/wav.scp text utt2spk utt2embedding.pt spk2embedding.pt utt2speech_token.pt;
        pretrained_dir/CosyVoice-BlankEN, the tokenizer of texts
writes  DATA_DIR/parquet/NNNNN.parquet (1,024 utterances each), DATA_DIR/parquet/data.list

The text is normalised here as synthesis does it (text.frontend); up to 20 changed texts are shown.
"""

import time
from itertools import islice
from pathlib import Path

import torch

from cosyvoice_ft import cli, conf, packing
from cosyvoice_ft.text import Tokenizer

SHOWN = 20


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="+")
    args, overrides = cli.parse_with_conf(parser)
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    torch.set_num_threads(1)  # utterances run side by side instead

    for packed in packing.pack(args.data_dir, Tokenizer(settings["pretrained_dir"]), settings):
        for utt, text in islice(packed.changed.items(), SHOWN):
            print(f"  {utt}: {packed.tables['text'][utt]}\n  {' ' * len(utt)}> {text}")
        print(f"wrote {packed.summary()}, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    cli.run(main)
