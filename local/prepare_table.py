#!/usr/bin/env python3
"""Stage 0 for a corpus with a table of its texts: csv or tsv with a header row, jsonl, path|text lists, LJSpeech.

    python local/prepare_table.py data/ljspeech --conf conf/ljspeech.yaml --corpus.dir LJSpeech-1.1

reads   corpus.dir and corpus.table, the file or files in it (default: the one that is recognised), UTF-8:
        header    columns by name: audio (path, file, wav ...), text (transcription, sentence ...), speaker, id,
                  instruct, ref_audio, split; separated by tab, comma, semicolon or |
        jsonl     objects with the same names
        list      path|text, path|speaker|text or path|speaker|language|text
        ljspeech  metadata.csv: id|text or id|text|normalised text; corpus.format ljspeech reads any file so
        sphinx    *.transcription: TEXT (id)
writes  data/NAME/{train,dev}: wav.scp text utt2spk spk2utt utt2dur, instruct and spk2prompt where the table has them;
        data/NAME/rejected.tsv

A recording is looked for as its path stands, beside the table, in corpus.dir, and by its name anywhere below.
What lies in dev, valid or test folders, tables or splits is held out.
"""

from pathlib import Path

from cosyvoice_ft import cli, conf, corpus, layout


def clips_of(table: Path, kind: str, sounds: layout.SoundIndex) -> list[corpus.Clip]:
    """Return the clips that a table lists."""
    rows = list(layout.read_rows(table, kind))
    names = layout.at_home([row["audio"] for row in rows])
    prompts = layout.at_home([row.get("ref_audio", "") for row in rows])
    return [
        corpus.Clip(
            sounds.find(name, row["where"]),
            row.get("text", ""),
            utt=row.get("id", ""),
            spk=row.get("speaker", ""),
            dev=corpus.held_out(table.stem) or corpus.held_out(row.get("part", "")),
            instruct=row.get("instruct", ""),
            prompt=sounds.find(prompt, row["where"]) if prompt else None,
        )
        for row, name, prompt in zip(rows, names, prompts, strict=True)
    ]


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    folder, own = layout.corpus_folder(settings, args.conf), settings["corpus"]
    ljspeech = own["format"] == "ljspeech"
    tables = layout.named_tables(folder, own["table"] or ("metadata.csv" if ljspeech else None))
    sounds = layout.SoundIndex(folder)
    clips = [clip for table in tables for clip in clips_of(table, "metadata" if ljspeech else "", sounds)]
    print(f"{folder}: {len(clips)} recordings in {', '.join(table.name for table in tables)}")
    if unlisted := sorted(set(sounds.sounds) - {path for clip in clips for path in (clip.wav, clip.prompt)}):
        print(f"  not in the table: {len(unlisted)} more below {folder}, the first: {unlisted[0]}")
    print(corpus.prepare(clips, args.data_dir, settings))


if __name__ == "__main__":
    cli.run(main)
