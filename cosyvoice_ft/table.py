"""Kaldi tables: text files of `<key> <value>` lines, sorted by key in C locale. The one reader and the one writer.

A data directory holds wav.scp, text, utt2spk, spk2utt, utt2dur (and instruct); the value may hold blanks.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cosyvoice_ft.files import BadInput, whole


def read_table(path: str | Path) -> dict[str, str]:
    """Read a table as {key: value}, in the order of the file. A key alone on its line has the value "".

    Raises BadInput naming file and line: a missing file, a text that is not UTF-8, an empty line, a key given twice.
    """
    path, table = Path(path), {}
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            key, _, value = line.decode("utf-8").strip(" \t\r").replace("\t", " ", 1).partition(" ")
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}:{number}: not UTF-8; convert the file first: iconv -f GB18030 -t UTF-8") from error
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


def write_data_dir(path: str | Path, rows: Iterable[Mapping]) -> None:
    """Write a data directory from rows with utt, wav, text, spk and seconds: wav.scp text utt2spk spk2utt utt2dur."""
    path, rows = Path(path), list(rows)
    utt2spk = {row["utt"]: row["spk"] for row in rows}
    write_table(path / "wav.scp", {row["utt"]: row["wav"] for row in rows})
    write_table(path / "text", {row["utt"]: row["text"] for row in rows})
    write_table(path / "utt2dur", {row["utt"]: f"{row['seconds']:.3f}" for row in rows})
    write_table(path / "utt2spk", utt2spk)
    write_table(path / "spk2utt", spk2utt(utt2spk))
