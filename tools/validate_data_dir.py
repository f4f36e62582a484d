#!/usr/bin/env python3
"""Check a data directory by the rules of Kaldi, and mend it: one that stage 0 or 7 wrote, or your own.

    python tools/validate_data_dir.py data/demo/train
    python tools/validate_data_dir.py data/demo/train --fix

reads   DATA_DIR/wav.scp text utt2spk spk2utt, and utt2dur instruct spk2prompt where there are such; the headers of the
        recordings (not with --no_audio)
writes  nothing; with --fix the tables: sorted, one line a key, the same utterances in all, durations of the recordings.
        What is dropped is named, and the tables as they were go to DATA_DIR/.backup

Each problem is a line: file:line, what, the rule, the cure. Exits 1 when there are any; --fix, when it cannot help.
"""

import shlex
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from cosyvoice_ft import cli
from cosyvoice_ft.data_dir import DataDir, Problem, read_headers
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import write_table

SHOWN = 20  # problems of one file and rule


def show(problems: Iterable[Problem]) -> None:
    """Print the problems, of one file and rule the first 20."""
    counts = Counter()
    for problem in problems:
        counts[problem.path, problem.rule] += 1
        if counts[problem.path, problem.rule] <= SHOWN:
            print(problem)
    for (path, rule), count in counts.items():
        if count > SHOWN:
            print(f"{path}: {count - SHOWN} more like this: {rule}")


def note_speaker_order(data: DataDir) -> None:
    """Kaldi also wants utt2spk sorted by speaker; nothing here does, so this is not a problem."""
    utts = sorted((utt.encode(), spk.encode()) for utt, (_, spk) in data.tables.get("utt2spk", {}).items())
    if utts != sorted(utts, key=lambda pair: pair[::-1]):
        print(f"note: {data.folder}/utt2spk is not sorted by speaker, too; Kaldi wants utterances named SPEAKER-ID")


def fix(data: DataDir) -> None:
    """Write the mended tables and name what is dropped. Raises BadInput when no utterance would be left."""
    tables, dropped = data.mended()
    kept, total, backup = len(tables.get("utt2spk", {})), len(data.utts()), data.folder / ".backup"
    if not kept:
        raise BadInput(f"{data.folder}: no utterance is in all tables, nothing is written; run stage 0 again")
    backup.mkdir(exist_ok=True)
    for name in tables.keys() & data.tables.keys():
        shutil.copy2(data.folder / name, backup / name)
    for name, rows in tables.items():
        write_table(data.folder / name, rows)
    for utt, names in dropped.items():
        print(f"dropped '{utt}': not in {' '.join(names)}, or of no use there")
    print(f"fixed {data.folder}: {kept} of {total} utterances; the tables as they were: {backup}")


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--fix", action="store_true", help="sort, clean and intersect the tables")
    parser.add_argument("--no_audio", action="store_true", help="do not open the recordings")
    args = parser.parse_args()
    data, duration = DataDir(args.data_dir), ""
    if not args.no_audio:
        wavs = {utt: path for utt, (_, path) in data.tables.get("wav.scp", {}).items() if path}
        seconds = data.compare_audio(cli.progress(read_headers(wavs), len(wavs), "recordings"))
        duration = f", {seconds / 60:.1f} min"
    show(data.problems)
    note_speaker_order(data)
    if data.problems and args.fix:
        fix(data)
    elif data.problems:
        command = f"python tools/validate_data_dir.py {shlex.quote(str(args.data_dir))} --fix"
        count = f"{len(data.problems)} problem{'s' * (len(data.problems) > 1)}"
        raise BadInput(f"{args.data_dir}: {count}, named above; --fix mends tables: {command}")
    else:
        speakers = len(data.tables["spk2utt"])
        print(f"{args.data_dir}: valid: {len(data.utts())} utterances, speakers: {speakers}{duration}")


if __name__ == "__main__":
    cli.run(main)
