#!/usr/bin/env python3
"""Stage 0 for a folder of recordings with a text file beside each: x.wav with x.normalized.txt, x.txt or x.lab.

    python local/prepare_pairs.py data/paimon --conf conf/paimon.yaml

reads   corpus.dir: recordings (wav, flac, mp3, ogg) at any depth, or in train/ and dev/ (valid/, test/) folders
writes  data/NAME/{train,dev}: wav.scp text utt2spk spk2utt utt2dur; data/NAME/rejected.tsv

Without a dev folder, corpus.dev_share of the utterances are held out. The text is kept as it stands.
"""

from pathlib import Path

from cosyvoice_ft import cli, conf, corpus
from cosyvoice_ft.files import BadInput

SOUND = (".wav", ".flac", ".mp3", ".ogg")
TEXT = (".normalized.txt", ".txt", ".lab")  # the first that exists counts


def text_of(wav: Path) -> str:
    """Return the text beside a recording, "" when there is none."""
    for suffix in TEXT:
        path = wav.with_name(wav.stem + suffix)
        if path.is_file():
            try:
                return corpus.one_line(corpus.read_text(path))
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}: not UTF-8; convert it: iconv -f GB18030 -t UTF-8") from error
    return ""


def clips_below(folder: Path, speaker: str, part: str) -> list[corpus.Clip]:
    """Return the recordings below `folder`, ids from their paths inside it."""
    wavs = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SOUND and path.is_file())
    return [corpus.Clip(corpus.clip_id(wav.relative_to(folder)), wav, text_of(wav), speaker, part) for wav in wavs]


def find_clips(folder: Path, speaker: str) -> list[corpus.Clip]:
    """Return all clips: of train/ and a held-out folder where there are such, else of the folder itself."""
    held_out = [folder / name for name in corpus.DEV_NAMES if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not held_out:
        return clips_below(folder, speaker, "")
    train = clips_below(folder / "train", speaker, "train")
    dev = [clip for path in held_out for clip in clips_below(path, speaker, "dev")]
    shared = {clip.utt for clip in train} & {clip.utt for clip in dev}
    for clip in train + dev:
        if clip.utt in shared:  # train/001.wav and dev/001.wav
            clip.utt = corpus.clip_id(clip.wav.relative_to(folder))
    return train + dev


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    folder = Path(settings["corpus"]["dir"] or "")
    if not settings["corpus"]["dir"] or not folder.is_dir():
        raise BadInput(
            f"corpus.dir: '{settings['corpus']['dir']}' is not a folder; set it in {args.conf} or by --corpus DIR"
        )
    clips = find_clips(folder, settings["corpus"]["speaker"])
    print(corpus.prepare(clips, args.data_dir, settings["corpus"], settings["seed"], settings["nj"]))


if __name__ == "__main__":
    cli.run(main)
