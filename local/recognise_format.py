#!/usr/bin/env python3
"""Stage 0, which tool prepares the corpus: print pairs, table or kaldi, for local/prepare_{pairs,table,kaldi}.py.

    python local/recognise_format.py --conf conf/paimon.yaml

reads   corpus.format; where that is auto, the files in corpus.dir: exactly one format must be recognised
"""

from collections import Counter
from pathlib import Path

from cosyvoice_ft import cli, conf, layout
from cosyvoice_ft.files import BadInput

TOOLS = {"pairs": "pairs", "libritts": "pairs", "table": "table", "ljspeech": "table", "kaldi": "kaldi"}


def recognised(folder: Path) -> dict[str, str]:
    """Return {format: the files that speak for it}."""
    sounds = layout.find_sounds(folder)
    pair = next(((sound, text) for sound in sounds if (text := layout.text_beside(sound))), ())
    found = {"kaldi": layout.kaldi_dirs(folder), "table": layout.find_tables(folder), "pairs": pair}
    return {name: " ".join(path.name for path in paths[:3]) for name, paths in found.items() if paths}


def choose(folder: Path) -> str:
    """Return the one format of a folder. Raises BadInput when there are several or none."""
    found = recognised(folder)
    if len(found) > 1:
        what = " or ".join(f"{name} ({files})" for name, files in found.items())
        raise BadInput(f"{folder}: could be {what}; say which: --corpus.format {' or '.join(found)}")
    if not found:
        suffixes = Counter(path.suffix for path in folder.rglob("*") if path.is_file()).most_common(4)
        holds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes) or "no files"
        raise BadInput(
            f"{folder}: no recordings with texts found (it holds {holds}); put x.txt beside each x.wav, or name a "
            "table of them: --corpus.table FILE"
        )
    return next(iter(found))


def main() -> None:
    args, overrides = cli.parse_with_conf(cli.parser(__doc__))
    settings = conf.load_conf(args.conf, overrides)
    own = settings["corpus"]
    if own["format"] != "auto":
        if own["format"] not in TOOLS:
            raise BadInput(f"corpus.format: '{own['format']}' is unknown; one of: auto {' '.join(TOOLS)}")
        print(TOOLS[own["format"]])
    elif own["table"]:
        print("table")
    else:
        print(choose(layout.corpus_folder(settings, args.conf)))


if __name__ == "__main__":
    cli.run(main)
