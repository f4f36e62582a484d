#!/usr/bin/env python3
"""Stage 0 for an existing Kaldi data directory: the same rules for its recordings, the same speakers.

    python local/prepare_kaldi.py data/mine --conf conf/mine.yaml --corpus.dir egs/mine/data

reads   corpus.dir: wav.scp, text, and utt2spk, instruct, spk2prompt where they are; or folders with these, of which
        those named dev, valid or test are held out; no segments, no commands in wav.scp. Relative paths count from
        here, else from corpus.dir.
writes  data/NAME/{train,dev}: wav.scp text utt2spk spk2utt utt2dur, instruct, spk2prompt; data/NAME/rejected.tsv

Utterance ids stay where there is one speaker, and where they begin with their speaker; else they become SPK-ID.
"""

from pathlib import Path

from cosyvoice_ft import cli, conf, corpus, layout
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import read_table


def clips_of(data: Path, folder: Path) -> list[corpus.Clip]:
    """Return the clips of one data directory.

    Raises BadInput when its tables do not list the same utterances, and for what is no sound file.
    """
    if (data / "segments").exists():
        script = "utils/data/extract_wav_segments_data_dir.sh"
        raise BadInput(f"{data / 'segments'}: recordings must be cut; with Kaldi: {script} {data} {data}_cut")
    tables = {name: read_table(data / name) for name in ("wav.scp", "text")}
    for name in ("utt2spk", "instruct", "spk2prompt"):
        tables[name] = read_table(data / name) if (data / name).exists() else {}
    wavs, spks = tables["wav.scp"], tables["utt2spk"]
    for name in ("text", "utt2spk"):
        if differ := sorted(wavs.keys() ^ tables[name].keys()) if tables[name] or name == "text" else []:
            raise BadInput(
                f"{data}: wav.scp and {name} differ in {len(differ)} utterances, the first: {differ[0]}; make them "
                f"agree, with Kaldi: utils/fix_data_dir.sh {data}"
            )

    def found(path: str) -> Path:
        if path.endswith("|"):
            raise BadInput(f"{data}: '{path}' is a command; write what it says to a file and name that in wav.scp")
        return Path(path) if Path(path).exists() else folder / path

    prompts = {spk: found(path) for spk, path in tables["spk2prompt"].items()}
    return [
        corpus.Clip(
            found(wav),
            tables["text"][utt],
            utt=utt,
            spk=spks.get(utt, ""),
            dev=data != folder and corpus.held_out(data.name),
            instruct=tables["instruct"].get(utt, ""),
            prompt=prompts.get(spks.get(utt, "")),
        )
        for utt, wav in wavs.items()
    ]


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    folder = layout.corpus_folder(settings, args.conf)
    dirs = layout.kaldi_dirs(folder)
    if not dirs:
        raise BadInput(f"{folder}: no wav.scp, nor in a folder below; corpus.format kaldi needs a data directory")
    clips = [clip for data in dirs for clip in clips_of(data, folder)]
    print(f"{folder}: {len(clips)} recordings in {', '.join(str(data / 'wav.scp') for data in dirs)}")
    print(corpus.prepare(clips, args.data_dir, settings))


if __name__ == "__main__":
    cli.run(main)
