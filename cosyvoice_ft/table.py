"""Kaldi tables: text files of `<key> <value>` lines, sorted by key in C locale. The one reader and the one writer.

A data directory holds wav.scp, text, utt2spk, spk2utt, utt2dur (and instruct, spk2prompt); the value may hold blanks.
wav.scp is written last: where it is, the others are complete.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cosyvoice_ft.files import BadInput, whole


def read_lines(path: str | Path) -> list[str]:
    """Read a text file as its lines, without a byte order mark and without line ends (LF or CRLF).

    Raises BadInput for a file that cannot be read, and for one that is not UTF-8, naming the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    encoding = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "GB18030"
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            lines[number - 1] = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            cure = f"convert the file first: iconv -f {encoding} -t UTF-8"
            raise BadInput(f"{path}:{number}: not UTF-8; {cure}") from error
    return lines


def read_table(path: str | Path) -> dict[str, str]:
    """Read a table as {key: value}, in the order of the file. A key alone on its line has the value "".

    Raises BadInput naming file and line: a missing file, a text that is not UTF-8, an empty line, a key given twice.
    """
    table = {}
    for number, line in enumerate(read_lines(path), 1):
        key, _, value = line.strip(" \t").replace("\t", " ", 1).partition(" ")
        if not key:
            raise BadInput(f"{path}:{number}: empty line; every line is '<key> <value>'")
        if key in table:
            raise BadInput(f"{path}:{number}: key '{key}' is there twice; keys are unique")
        table[key] = value.strip(" \t")
    return table


def write_table(path: str | Path, table: Mapping[str, object]) -> None:
    """Write {key: value} sorted by key in C locale (the order of the UTF-8 bytes), whole or not at all."""
    with whole(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for key in sorted(table, key=lambda key: key.encode("utf-8")):
            file.write(f"{key} {table[key]}".rstrip() + "\n")


def spk2utt(utt2spk: Mapping[str, str]) -> dict[str, str]:
    """Turn {utt: spk} round: {spk: "utt utt ..."}, both sorted in C locale."""
    groups: dict[str, list[str]] = {}
    for utt in sorted(utt2spk, key=lambda utt: utt.encode("utf-8")):
        groups.setdefault(utt2spk[utt], []).append(utt)
    return {spk: " ".join(utts) for spk, utts in groups.items()}


def write_data_dir(path: str | Path, rows: Iterable[Mapping], spk2prompt: Mapping[str, object] | None = None) -> None:
    """Write a data directory: wav.scp text utt2spk spk2utt utt2dur, and what else there is: instruct, spk2prompt.

    rows: utt, wav, text, spk, seconds, and instruct where an utterance has one. spk2prompt: {speaker: sound file}.
    """
    path, rows = Path(path), list(rows)
    (path / "wav.scp").unlink(missing_ok=True)
    utt2spk = {row["utt"]: row["spk"] for row in rows}
    tables = {
        "text": {row["utt"]: row["text"] for row in rows},
        "utt2spk": utt2spk,
        "spk2utt": spk2utt(utt2spk),
        "utt2dur": {row["utt"]: f"{row['seconds']:.3f}" for row in rows},
        "instruct": {row["utt"]: row["instruct"] for row in rows if row.get("instruct")},
        "spk2prompt": {spk: wav for spk, wav in (spk2prompt or {}).items() if spk in utt2spk.values()},
        "wav.scp": {row["utt"]: row["wav"] for row in rows},
    }
    for name, table in tables.items():
        if table or name not in ("instruct", "spk2prompt"):
            write_table(path / name, table)
        else:
            (path / name).unlink(missing_ok=True)
