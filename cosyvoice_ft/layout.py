"""What a corpus brings: sound files in folders, and tables that say what is spoken in them.

Tables, recognised by their first line:

    header    a header row, then rows split by tab, comma, semicolon or |; columns by name (COLUMNS)
    jsonl     one json object a line, the same names
    list      path|text, path|speaker|text or path|speaker|language|text
    metadata  a file named metadata.csv without a header: id|text or id|text|normalised text (LJSpeech)
    sphinx    a file named *.transcription: TEXT (id), <s> TEXT </s> (id)
"""

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import read_lines

SOUND = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".sph")
TABLE = (".csv", ".tsv", ".jsonl", ".json", ".list", ".lst", ".txt", ".transcription")
COLUMNS = {  # what a column holds, and its names; of several names in one table the first here counts
    "audio": ("audio", "path", "file", "file_name", "filename", "filepath", "audio_path", "audio_file")
    + ("audio_filepath", "wav", "wav_path", "wav_filename"),
    "text": ("normalized_text", "normalised_text", "text", "transcription", "transcript", "sentence"),
    "speaker": ("speaker", "spk", "speaker_id", "speaker_name", "spk_id", "client_id"),
    "id": ("id", "utt", "utterance", "utt_id", "utterance_id"),
    "instruct": ("instruct", "instruction"),
    "ref_audio": ("ref_audio", "prompt_audio", "prompt_wav"),
    "part": ("split", "subset"),
}
NEEDED = "a table needs a column audio (or path, file, id) and a column text"
SPHINX = re.compile(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\(([^()\s]+)\)\s*")


def corpus_folder(settings: Mapping, conf: object) -> Path:
    """Return corpus.dir. Raises BadInput when it is not set or no folder; `conf` is the file to set it in."""
    folder = settings["corpus"]["dir"]
    if not folder:
        raise BadInput(f"corpus.dir: not set; say where the recordings are, in {conf} or by --corpus DIR")
    if not Path(folder).is_dir():
        raise BadInput(f"corpus.dir: '{folder}' is not a folder; set it in {conf} or by --corpus DIR")
    return Path(folder)


def find_sounds(folder: Path) -> list[Path]:
    """Return all sound files below a folder, by their suffix, sorted; names that begin with a dot do not count.

    Raises BadInput for a folder that cannot be listed and for a name that no table can hold.
    """

    def stop(error: OSError) -> None:
        raise BadInput(f"{error.filename}: cannot be listed ({error.strerror}); mend its permissions") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders + files:
            if name.lower().endswith(SOUND) and not name.startswith("."):
                found.append(Path(parent, name))
    for path in found:
        if re.search(r"[\x00-\x1f\ud800-\udfff]", str(path)):  # surrogates stand for bytes that are not UTF-8
            raise BadInput(f"{str(path)!r}: the name is not UTF-8 text on one line; rename it")
    return sorted(found)


def text_beside(sound: Path) -> Path | None:
    """Return the text file of a sound: x.normalized.txt, x.txt or x.lab beside x.wav, the first that exists."""
    paths = (sound.with_name(sound.stem + suffix) for suffix in (".normalized.txt", ".txt", ".lab"))
    return next((path for path in paths if path.exists()), None)


def kaldi_dirs(folder: Path) -> list[Path]:
    """Return the Kaldi data directories: the folder itself, or those in it."""
    return [path.parent for path in sorted(folder.glob("wav.scp")) or sorted(folder.glob("*/wav.scp"))]


def named_tables(folder: Path, table: str | list[str] | None) -> list[Path]:
    """Return the tables of a corpus: those named, below the folder or anywhere; else the one that is recognised.

    table: corpus.table. Raises BadInput when a named one is missing, when there is none or more than one.
    """
    if table:
        names = [table] if isinstance(table, str) else table
        paths = [path if (path := folder / name).exists() else Path(name) for name in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise BadInput(f"corpus.table: {missing[0]} does not exist, nor does {folder / missing[0]}")
        return paths
    paths = find_tables(folder)
    if len(paths) > 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in paths)
        raise BadInput(f"{folder}: several tables; say which, one or more: --corpus.table '[{names}]'")
    if not paths:
        raise BadInput(f"{folder}: no table of texts is recognised; name it: --corpus.table FILE")
    return paths


def find_tables(folder: Path) -> list[Path]:
    """Return the files in a folder, or one folder below, whose first line shows that they are tables of a corpus."""
    paths = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix.lower() in TABLE)
    sounds = {path.with_suffix("") for path in find_sounds(folder)}
    texts = [path for path in paths if path.parent / path.name.split(".")[0] not in sounds]  # not x.txt beside x.wav
    return [path for path in texts if path.is_file() and kind_of(path)]


def kind_of(path: Path) -> str:
    """Return the kind of a table, "" for a file that is none. Raises BadInput for a file that cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = next((line.strip() for line in file if line.strip()), "")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    cells = first.split("|")
    if first.startswith("{"):
        return "jsonl" if is_header(json_keys(first)) else ""
    if is_header(split_header(first)[0]):
        return "header"
    if path.suffix == ".transcription" and SPHINX.fullmatch(first):
        return "sphinx"
    if path.name == "metadata.csv" and 2 <= len(cells) <= 3:
        return "metadata"
    return "list" if 2 <= len(cells) <= 4 and cells[0].strip().lower().endswith(SOUND) else ""


def json_keys(line: str) -> list[str]:
    try:
        return [key.lower() for key in json.loads(line)]
    except ValueError:
        return []


def split_header(line: str) -> tuple[list[str], str]:
    """Return the names in a header row, and what splits them."""
    for delimiter in "\t|,;":
        names = [name.strip(' "').lower() for name in line.split(delimiter)]
        if is_header(names):
            return names, delimiter
    return [], ""


def is_header(names: list[str]) -> bool:
    return bool(column("text", names) and (column("audio", names) or column("id", names)))


def column(what: str, names: list[str]) -> str:
    """Return the name among `names` of the column that holds `what`, "" when there is none."""
    return next((name for name in COLUMNS[what] if name in names), "")


def read_rows(path: Path, kind: str = "") -> Iterator[dict[str, str]]:
    """Yield the rows of a table as {what: value} with the keys of COLUMNS that it has, and "where": file and line.

    Without a column audio, the id stands for it. Raises BadInput naming file and line.
    """
    lines, kind = read_lines(path), kind or kind_of(path)
    if not kind:
        raise BadInput(f"{path}:1: neither a header row ({NEEDED}) nor path|text nor path|speaker|text")
    readers = {"header": header_rows, "jsonl": json_rows, "list": list_rows, "metadata": metadata_rows}
    for number, row in readers.get(kind, sphinx_rows)(path, lines):
        row = {what: value.strip() for what, value in row.items()} | {"where": f"{path}:{number}"}
        row.setdefault("audio", row.get("id", ""))
        if not row["audio"]:
            raise BadInput(f"{path}:{number}: no audio, and no id to find it by")
        yield row


def header_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    if not lines[0].strip():
        raise BadInput(f"{path}:1: empty line; the header row is the first line")
    names, delimiter = split_header(lines[0])
    columns = {what: names.index(column(what, names)) for what in COLUMNS if column(what, names)}
    for number, cells in csv_cells(path, lines, delimiter) if delimiter in ",;" else plain_cells(lines, delimiter):
        if number == 1 or not any(cells):
            continue
        if len(cells) != len(names):
            raise BadInput(f"{path}:{number}: {len(cells)} columns, the header row has {len(names)}; mend the line")
        yield number, {what: cells[index] for what, index in columns.items()}


def csv_cells(path: Path, lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Split lines at delimiters outside of double quotes; a quoted cell may hold line breaks."""
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: not valid csv ({error}); mend the double quotes") from error


def plain_cells(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Split lines at every delimiter; quotes go where they wrap a whole cell, as spreadsheets write them."""
    for number, line in enumerate(lines, 1):
        cells = line.split(delimiter)
        for i, cell in enumerate(cells):
            inner = cell[1:-1].replace('""', "")
            if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner:
                cells[i] = cell[1:-1].replace('""', '"')
        yield number, cells


def json_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in filled(lines):
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}:{number}: not valid json ({error.msg}); one object a line") from error
        data = {key.lower(): value for key, value in data.items()} if isinstance(data, dict) else {}
        if not is_header(list(data)):
            raise BadInput(f"{path}:{number}: {NEEDED}")
        row = {what: data[column(what, list(data))] for what in COLUMNS if column(what, list(data))}
        if bad := [what for what, value in row.items() if not isinstance(value, str | int | None)]:
            raise BadInput(f"{path}:{number}: {bad[0]} is a {type(row[bad[0]]).__name__}; it is a text")
        yield number, {what: str(value) for what, value in row.items() if value is not None}


def list_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    orders = {2: ("audio", "text"), 3: ("audio", "speaker", "text"), 4: ("audio", "speaker", "language", "text")}
    for number, line in filled(lines):
        cells = line.split("|")
        row = dict(zip(orders.get(len(cells), ()), cells, strict=False))
        if not row or len(row.get("speaker", "")) > 64 or len(row.get("language", "").strip()) > 8:
            known = ", ".join("|".join(order) for order in orders.values()).replace("audio", "path")
            raise BadInput(f"{path}:{number}: '{line[:60]}' is none of {known}; for other orders write a header row")
        row.pop("language", "")
        yield number, row


def metadata_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in filled(lines):
        utt, *texts = line.split("|")
        if not 1 <= len(texts) <= 2 or not utt.strip():
            raise BadInput(f"{path}:{number}: '{line[:60]}' is not 'id|text' or 'id|text|normalised text'")
        yield number, {"audio": utt, "text": texts[-1].strip() or texts[0]}


def sphinx_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in filled(lines):
        match = SPHINX.fullmatch(line)
        if not match:
            raise BadInput(f"{path}:{number}: '{line[:60]}' is not 'TEXT (id)'")
        yield number, {"audio": match[2], "text": match[1]}


def filled(lines: list[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


class SoundIndex:
    """Finds the sounds that the tables of a corpus name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sounds = folder, find_sounds(folder)
        self.by_name: dict[str, list[Path]] = {}
        for path in self.sounds:
            for name in (path.name, path.stem):
                self.by_name.setdefault(plain(name), []).append(path)

    def find(self, name: str, where: str) -> Path:
        """Return the sound file of a name: as it stands, beside its table, below the corpus, or the one that ends so.

        name: a path, or a file name with or without its suffix. where: "table:line". What is nowhere is returned as a
        path below the corpus. Raises BadInput when several files end so.
        """
        wanted = PurePosixPath(plain(name)).parts
        for folder in (Path(where).parent, self.folder):
            if name.lower().endswith(SOUND) and (folder / name).exists():
                return folder / name
        found = [path for path in self.by_name.get("".join(wanted[-1:]), ()) if ends_in(path, wanted)]
        if len(found) > 1:
            raise BadInput(f"{where}: '{name}' could be {found[0]} or {found[1]}; give more of the path")
        return found[0] if found else self.folder / name


def ends_in(path: Path, wanted: tuple[str, ...]) -> bool:
    """Tell whether the last parts of a path, with or without its suffix, are those wanted (plain)."""
    return wanted in (PurePosixPath(plain(str(p))).parts[-len(wanted) :] for p in (path, path.with_suffix("")))


def plain(name: str) -> str:
    """Return a name without what differs between systems: upper case, and how accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def at_home(names: list[str]) -> list[str]:
    """Return the names of sounds with / for the backslashes of Windows; of absolute paths that are not on this machine
    only what follows the folder that all of them share.
    """
    names = [name.replace("\\", "/") for name in names]
    foreign = {n: n.lstrip("/") for n in names if re.match(r"([A-Za-z]:)?/", n) and not Path(n).exists()}
    shared = os.path.commonpath([os.path.dirname(name) for name in foreign.values()]) if foreign else ""
    return [os.path.relpath(foreign[name], shared or ".") if name in foreign else name for name in names]
