"""A data directory as it stands on disk: every line that breaks a rule, and the tables as they should be.

The rules are those of Kaldi's validate_data_dir.sh: a table has one line a key, sorted in C locale; utt2spk, wav.scp,
text and utt2dur have the same utterances; spk2utt is utt2spk turned round. Also, each recording can be opened and lasts
as long as utt2dur says. table.read_table reads what keeps the rules; this module says what does not.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cosyvoice_ft import audio, table
from cosyvoice_ft.files import BadInput

NEEDED = ("utt2spk", "wav.scp", "text", "spk2utt")
OPTIONAL = ("utt2dur", "instruct", "spk2prompt")
OF_ALL_UTTS = ("utt2spk", "wav.scp", "text", "utt2dur")
TOLERANCE = 0.02  # s between utt2dur and the header
CHUNK = 4096  # recordings handed to the threads at once, so that memory does not grow with the corpus
BOM = b"\xef\xbb\xbf"
ODD_SPACE = re.compile(r"[^\S \t]|[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # blanks of other kinds, control characters

CLEANS, DROPS = "--fix writes it so", "mend it, or --fix drops the utterance"  # cures
TURNS, MEASURES = "--fix makes it from utt2spk", "--fix takes that of the recording"


@dataclass(frozen=True)
class Problem:
    """What is wrong in a line of a file (None: with the whole of it), the rule that it breaks, and the cure."""

    path: Path
    line: int | None
    what: str
    rule: str
    cure: str

    def __str__(self) -> str:
        return f"{self.path}{f':{self.line}' if self.line else ''}: {self.what}; {self.rule} (fix: {self.cure})"


class DataDir:
    """The tables of a data directory, those there are, and what is wrong with them.

    tables: {name: {key: (line, value)}}, of a key given twice the first line; a value that cannot be used is "".
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the tables and compare them. Raises BadInput when there is no such directory."""
        self.folder = Path(folder)
        self.problems: list[Problem] = []
        self.tables: dict[str, dict[str, tuple[int, str]]] = {}
        if not self.folder.is_dir():
            raise BadInput(f"{folder}: no such directory; stage 0 makes data/NAME/train and data/NAME/dev")
        for name in (*NEEDED, *OPTIONAL):
            if (self.folder / name).is_file():
                self.tables[name] = self._read(name)
            elif name in NEEDED:
                cure = TURNS if name == "spk2utt" else "run stage 0"
                self._report(name, None, "missing", f"needed are {' '.join(NEEDED)}", cure)
        self._compare_utts()
        self._compare_speakers()

    def _report(self, name: str, line: int | None, what: str, rule: str, cure: str) -> None:
        self.problems.append(Problem(self.folder / name, line, what, rule, cure))

    def _read(self, name: str) -> dict[str, tuple[int, str]]:
        rows, last = {}, ""
        for number, line in self._lines(name):
            key, _, value = line.strip(" \t\r").replace("\t", " ", 1).partition(" ")
            if not key:
                self._report(name, number, "empty line", "every line is '<key> <value>'", CLEANS)
            elif key in rows:
                self._report(name, number, f"'{key}' again", "keys are unique", f"--fix keeps line {rows[key][0]}")
            else:
                if key.encode() < last.encode():
                    self._report(name, number, f"'{key}' after '{last}'", "keys are sorted in C locale", CLEANS)
                rows[key], last = (number, self._checked(name, number, key, value.strip(" \t"))), key
        return rows

    def _lines(self, name: str) -> Iterator[tuple[int, str]]:
        """Yield (number, line) of a table, without lines that are no text."""
        content = (self.folder / name).read_bytes()
        if content.startswith(BOM):
            self._report(name, 1, "begins with a byte order mark", "tables are plain UTF-8", CLEANS)
        if not content.endswith(b"\n"):
            self._report(name, content.count(b"\n") + 1, "no line end", "the last line has one, too", CLEANS)
        for number, line in enumerate(content.removeprefix(BOM).removesuffix(b"\n").split(b"\n"), 1):
            if line.endswith(b"\r"):
                self._report(name, number, "ends in CR LF", "lines end in LF alone", CLEANS)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError:
                cure = "iconv -f GB18030 -t UTF-8, or --fix drops the line"
                self._report(name, number, "not UTF-8", "tables are UTF-8", cure)

    def _checked(self, name: str, number: int, key: str, value: str) -> str:
        """Return the value of a line as its table wants it, "" when it cannot be used."""
        if not value:
            self._report(name, number, f"'{key}' has no value", "every line is '<key> <value>'", DROPS)
        elif name == "utt2spk" and len(value.split()) > 1:
            self._report(name, number, f"'{key}' has speaker '{value}'", "a speaker is one word", DROPS)
            return ""
        elif name == "utt2dur" and not is_duration(value):
            self._report(name, number, f"'{key}' lasts '{value}'", "a duration is seconds, more than 0", MEASURES)
            return ""
        elif name == "text" and (odd := ODD_SPACE.search(value)):
            self._report(name, number, f"'{key}' has U+{ord(odd[0]):04X}", "white space in text is blanks", CLEANS)
            return " ".join(ODD_SPACE.sub(" ", value).split())
        return value

    def utts(self) -> list[str]:
        """Return the utterances that any table names."""
        return list(dict.fromkeys(utt for name in OF_ALL_UTTS for utt in self.tables.get(name, {})))

    def _compare_utts(self) -> None:
        present = [name for name in OF_ALL_UTTS if name in self.tables]
        for utt in self.utts():
            having = [name for name in present if utt in self.tables[name]]
            lacking = [name for name in present if name not in having]
            if lacking:
                line, cure = self.tables[having[0]][utt][0], MEASURES if lacking == ["utt2dur"] else DROPS
                what = f"'{utt}' is not in {' '.join(lacking)}"
                self._report(having[0], line, what, "all tables have the same utterances", cure)

    def _compare_speakers(self) -> None:
        utt2spk = {utt: spk for utt, (_, spk) in self.tables.get("utt2spk", {}).items() if spk}
        turned = table.spk2utt(utt2spk)
        for name, known in (("instruct", utt2spk), ("spk2prompt", turned), ("spk2utt", turned)):
            for key, (number, _) in self.tables.get(name, {}).items():
                if key not in known:
                    self._report(name, number, f"'{key}' is not in utt2spk", "utt2spk has them all", CLEANS)
        for spk, utts in turned.items() if "spk2utt" in self.tables else ():
            number, listed = self.tables["spk2utt"].get(spk, (None, ""))
            if listed.split() != utts.split():
                what = f"'{spk}' has other utterances than in utt2spk"
                self._report("spk2utt", number, what, "spk2utt is utt2spk turned round", TURNS)

    def compare_audio(self, headers: Iterable[tuple[str, float | str]]) -> float:
        """Compare with (utt, seconds or why it cannot be read) of the recordings, which are right; return the sum."""
        wavs, durations, total = self.tables.get("wav.scp", {}), self.tables.get("utt2dur", {}), 0.0
        for utt, header in headers:
            if isinstance(header, str):
                self._report("wav.scp", wavs[utt][0], f"'{utt}': {header}", "every recording can be opened", DROPS)
                wavs[utt] = (wavs[utt][0], "")
                continue
            total += header
            number, given = durations.get(utt, (0, ""))
            if given and abs(float(given) - header) <= TOLERANCE:
                continue
            if given:
                what = f"'{utt}' lasts {given} s, its recording {header:.3f} s"
                self._report("utt2dur", number, what, f"they agree within {TOLERANCE} s", MEASURES)
            durations[utt] = (number, f"{header:.3f}")
        return total

    def mended(self) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
        """Return the tables with the utterances that all can use, and {dropped utt: tables that cannot use it}."""
        of_all = [name for name in OF_ALL_UTTS if name in self.tables or name in NEEDED]
        values = {name: {key: value for key, (_, value) in rows.items() if value} for name, rows in self.tables.items()}
        lacking = {utt: [name for name in of_all if utt not in values.get(name, {})] for utt in self.utts()}
        utt2spk = {utt: spk for utt, spk in values.get("utt2spk", {}).items() if not lacking[utt]}
        tables = {"spk2utt": table.spk2utt(utt2spk)}
        for name in values.keys() - tables.keys():
            kept = tables["spk2utt"] if name == "spk2prompt" else utt2spk
            tables[name] = {key: value for key, value in values[name].items() if key in kept}
        return tables, {utt: names for utt, names in lacking.items() if names}


def is_duration(value: str) -> bool:
    try:
        return 0 < float(value) < math.inf
    except ValueError:
        return False


def read_headers(wavs: Mapping[str, str]) -> Iterator[tuple[str, float | str]]:
    """Yield (utt, seconds by the header, or why it cannot be read) of {utt: path}, several at a time."""
    utts = list(wavs)
    with ThreadPoolExecutor() as pool:  # libsndfile and the file system work without the interpreter lock
        for first in range(0, len(utts), CHUNK):
            chunk = utts[first : first + CHUNK]
            yield from zip(chunk, pool.map(read_header, map(wavs.get, chunk)), strict=True)


def read_header(path: str) -> float | str:
    if path.endswith("|"):
        return "a command, not a file"
    try:
        return audio.duration(path)[0]
    except BadInput as error:
        return str(error)
