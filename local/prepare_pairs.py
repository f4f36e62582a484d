#!/usr/bin/env python3
"""Stage 0 for recordings with a text file beside each: x.wav with x.normalized.txt, x.txt or x.lab; also LibriTTS.

    python local/prepare_pairs.py data/paimon --conf conf/paimon.yaml

reads   corpus.dir: recordings (wav, flac, mp3, ogg, opus, sph) at any depth, their texts in UTF-8
writes  data/NAME/{train,dev}: wav.scp text utt2spk spk2utt utt2dur; data/NAME/rejected.tsv

What lies in folders named dev, valid or test (dev-clean, test-other) is held out, else corpus.dev_share of the
utterances. The speaker is corpus.speaker, else the folder. The text is kept as it stands.
"""

from pathlib import Path

from cosyvoice_ft import cli, conf, corpus, layout
from cosyvoice_ft.table import read_lines


def text_of(sound: Path) -> str:
    """Return the text beside a recording, "" when there is none."""
    path = layout.text_beside(sound)
    return " ".join(read_lines(path)) if path else ""


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    folder = layout.corpus_folder(settings, args.conf)
    clips = [corpus.Clip(wav, text_of(wav)) for wav in layout.find_sounds(folder)]
    print(f"{folder}: {len(clips)} recordings, texts in files beside them")
    print(corpus.prepare(clips, args.data_dir, settings))


if __name__ == "__main__":
    cli.run(main)
