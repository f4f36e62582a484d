#!/usr/bin/env python3
"""Stage 0 for a corpus with a list of its texts: LJSpeech's metadata.csv, `id|text|normalised text`, and wavs/id.wav.

    python local/prepare_table.py data/ljspeech --conf conf/ljspeech.yaml --corpus.dir LJSpeech-1.1

reads   corpus.dir: metadata.csv (the last column is the text) and wavs/ with .wav or .flac files
writes  data/NAME/{train,dev}: wav.scp text utt2spk spk2utt utt2dur; data/NAME/rejected.tsv
"""

from pathlib import Path

from cosyvoice_ft import cli, conf, corpus
from cosyvoice_ft.files import BadInput


def read_metadata(path: Path, speaker: str) -> list[corpus.Clip]:
    """Return the clips of an LJSpeech metadata.csv. Raises BadInput naming file and line."""
    try:
        lines = corpus.read_text(path).splitlines()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); corpus.format ljspeech needs this file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8; convert it: iconv -f GB18030 -t UTF-8") from error
    clips = []
    for number, line in enumerate(lines, 1):
        utt, *texts = line.split("|")
        if not texts or not utt.strip():
            raise BadInput(f"{path}:{number}: '{line[:60]}' is not 'id|text' or 'id|text|normalised text'")
        wav = path.parent / "wavs" / f"{utt}.wav"
        if not wav.exists() and wav.with_suffix(".flac").exists():
            wav = wav.with_suffix(".flac")
        clips.append(corpus.Clip(corpus.clip_id(Path(f"{utt}.wav")), wav, corpus.one_line(texts[-1]), speaker))
    return clips


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    if not settings["corpus"]["dir"]:
        raise BadInput(f"corpus.dir: not set; say where the recordings are, in {args.conf} or by --corpus DIR")
    clips = read_metadata(Path(settings["corpus"]["dir"]) / "metadata.csv", settings["corpus"]["speaker"])
    print(corpus.prepare(clips, args.data_dir, settings["corpus"], settings["seed"], settings["nj"]))


if __name__ == "__main__":
    cli.run(main)
