"""What is to be spoken: a text file, one sentence a line, or tts_text.json: speaker -> mode -> sentences.

    {"paimon": {"sft": ["..."], "zero-shot": ["..."], "cross-lingual": ["..."],
                "instruction": {"instruction": "...", "text": "..."}}}

The value of a mode is a sentence or a list; of `instruction` an object or a list of objects. A list in place of the
modes is spoken as sft.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from cosyvoice_ft.files import BadInput

MODES = {
    "sft": "sft",
    "sft_inference": "sft",
    "zero-shot": "zero_shot",
    "zero_shot": "zero_shot",
    "cross-lingual": "cross_lingual",
    "cross_lingual": "cross_lingual",
    "instruction": "instruct",
    "instruct": "instruct",
    "instruction-zero-shot": "instruct",
}


@dataclass
class Line:
    """One sentence as the file gives it; spk None: the file does not say. where: file and line, for messages."""

    spk: str | None
    mode: str
    text: str
    instruction: str = ""
    where: str = field(default="", compare=False)


def read_texts(path: Path, mode: str = "sft") -> list[Line]:
    """Read a text file or a tts_text.json; `mode` is that of a text file.

    Raises BadInput naming file and line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a file with one sentence a line") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8; convert it: iconv -f GB18030 -t UTF-8") from error
    if path.suffix == ".json":
        lines = Json(path, content).lines()
    else:
        numbered = enumerate(content.splitlines(), 1)
        lines = [Line(None, mode, line.strip(), where=f"{path}:{n}") for n, line in numbered if line.strip()]
    if not lines:
        raise BadInput(f"{path}: no sentences; write one a line")
    return lines


class Json:
    """A tts_text.json, and where in it things stand."""

    def __init__(self, path: Path, content: str) -> None:
        self.path, self.content = path, content
        try:
            self.data = json.loads(content, object_pairs_hook=self.no_key_twice)
        except json.JSONDecodeError as error:
            before = content[: error.pos].rstrip()
            hint = "; a comma before the closing bracket is one too many" if before.endswith(",") else ""
            raise BadInput(f"{path}:{error.lineno}: not valid json: {error.msg}{hint}") from error

    def no_key_twice(self, pairs: list[tuple]) -> dict:
        for i, (key, _) in enumerate(pairs):
            if key in dict(pairs[:i]):
                raise BadInput(f"{self.where(key)}: '{key}' is there twice")
        return dict(pairs)

    def where(self, *keys: str) -> str:
        """Return file and line of the last of these keys, each of which stands in the value of the one before."""
        position = 0
        for key in keys:
            found = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:").search(self.content, position)
            position = found.end() if found else position
        return f"{self.path}:{self.content.count(chr(10), 0, position) + 1}"

    def lines(self) -> list[Line]:
        if not isinstance(self.data, dict):
            raise BadInput(f"{self.path}:1: a tts_text.json is an object: speaker -> mode -> sentences")
        return [
            line
            for spk, modes in self.data.items()
            for mode, value in (modes if isinstance(modes, dict) else {"sft": modes}).items()
            for line in self.of_mode(spk, mode, value)
        ]

    def of_mode(self, spk: str, mode: str, value) -> list[Line]:
        where = self.where(spk, mode)
        if mode not in MODES:
            raise BadInput(f"{where}: '{spk}': mode '{mode}' is unknown; one of: {', '.join(MODES)}")
        entries = value if isinstance(value, list) else [value]
        if MODES[mode] != "instruct":
            for entry in entries:
                if not is_text(entry):
                    raise BadInput(f"{where}: '{spk}', '{mode}': {entry!r} is not a sentence")
            return [Line(spk, MODES[mode], entry.strip(), where=where) for entry in entries]
        for entry in entries:
            if not isinstance(entry, dict) or not all(is_text(entry.get(key)) for key in ("instruction", "text")):
                shape = '{"instruction": "...", "text": "..."}'
                raise BadInput(f"{where}: '{spk}', '{mode}': every entry is {shape}")
        return [Line(spk, "instruct", entry["text"].strip(), entry["instruction"].strip(), where) for entry in entries]


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
