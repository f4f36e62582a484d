"""tools/validate_data_dir.py: every broken rule is found at its line, and what --fix writes follows the rules."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest
import soundfile

from cosyvoice_ft.data_dir import DataDir, read_headers
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import read_table, write_data_dir

TABLES = ("wav.scp", "text", "utt2spk", "spk2utt", "utt2dur")


@pytest.fixture
def data(tmp_path):
    """A valid data directory: two speakers, five recordings in a folder with a blank and Chinese in its name."""
    wavs = tmp_path / "派蒙 wavs"
    wavs.mkdir()
    rows = []
    for i, utt in enumerate(("a-1", "a-10", "a-2", "派-1", "派-2")):
        soundfile.write(wavs / f"{utt}.wav", np.full(24000 + 100 * i, 0.1), 24000)
        row = {"utt": utt, "wav": wavs / f"{utt}.wav", "text": f"你好， {i}.", "spk": utt.split("-")[0]}
        rows.append(row | {"seconds": 1 + i / 240})
    write_data_dir(tmp_path / "data", rows)
    return tmp_path / "data"


@pytest.fixture
def validate(root, monkeypatch, capsys):
    """validate(folder, options...): (what it printed, the error or "")."""
    spec = importlib.util.spec_from_file_location("validate_data_dir", root / "tools/validate_data_dir.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["validate_data_dir.py", *map(str, words)])
        error = ""
        try:
            tool.main()
        except BadInput as bad:
            error = str(bad)
        return capsys.readouterr().out, error

    return run


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def edit_lines(path, change):
    edit(path, lambda content: b"".join(line + b"\n" for line in change(content.split(b"\n")[:-1])))


def everything(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_valid_directory(data, validate, run_tool):
    assert validate(data) == (f"{data}: valid: 5 utterances, speakers: 2, 0.1 min\n", "")
    before = everything(data)
    assert validate(data, "--fix")[1] == "" and everything(data) == before
    for name in ("instruct", "spk2prompt", "utt2dur"):  # optional ones: some of the keys, all of them, none
        (data / name).unlink(missing_ok=True)
    (data / "instruct").write_text("a-1 Speak slowly.\n")
    (data / "spk2prompt").write_text("a a-10\n")
    assert "valid: 5 utterances" in run_tool("tools/validate_data_dir.py", data).stdout


REPAIRED = {  # name: (file, change of its lines, line or None, what is said, utterances that are left)
    "unsorted": ("text", lambda lines: [lines[1], lines[0], *lines[2:]], 2, "'a-1' after 'a-10'; keys are sorted", 5),
    "locale": ("wav.scp", lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 3, "'a-10' after 'a-2'", 5),
    "duplicate": ("utt2spk", lambda lines: [lines[0], *lines], 2, "'a-1' again; keys are unique", 5),
    "missing key": ("text", lambda lines: lines[1:], None, "'a-1' is not in text; all tables have the same", 4),
    "extra key": ("text", lambda lines: [*lines, "龙-1 x".encode()], 6, "'龙-1' is not in utt2spk wav.scp utt2dur", 5),
    "no duration": ("utt2dur", lambda lines: lines[1:], None, "'a-1' is not in utt2dur", 5),
    "crlf": ("utt2spk", lambda lines: [lines[0] + b"\r", *lines[1:]], 1, "ends in CR LF", 5),
    "empty line": ("wav.scp", lambda lines: [lines[0], b"", *lines[1:]], 2, "empty line", 5),
    "no value": ("text", lambda lines: [b"a-1", *lines[1:]], 1, "'a-1' has no value", 4),
    "bad utf-8": ("text", lambda lines: [b"a-1 \xcc\xec", *lines[1:]], 1, "not UTF-8; tables are UTF-8", 4),
    "ideographic blank": ("text", lambda lines: [lines[0] + "\u3000x".encode(), *lines[1:]], 1, "U+3000", 5),
    "control character": ("text", lambda lines: [lines[0] + b"\x07x", *lines[1:]], 1, "'a-1' has U+0007", 5),
    "two speakers": ("utt2spk", lambda lines: [b"a-1 a b", *lines[1:]], 1, "'a-1' has speaker 'a b'", 4),
    "other spk2utt": ("spk2utt", lambda lines: [b"a a-1 a-2", *lines[1:]], 1, "'a' has other utterances", 5),
    "unknown speaker": ("spk2utt", lambda lines: [*lines, "龙 龙-1".encode()], 3, "'龙' is not in utt2spk", 5),
    "lost speaker": ("spk2utt", lambda lines: lines[:1], None, "'派' has other utterances", 5),
    "wrong duration": ("utt2dur", lambda lines: [b"a-1 1.5", *lines[1:]], 1, "1.5 s, its recording 1.000 s", 5),
    "no number": ("utt2dur", lambda lines: [b"a-1 nan", *lines[1:]], 1, "'a-1' lasts 'nan'", 5),
    "missing audio": (
        "wav.scp",
        lambda lines: [b"a-1 no/where.wav", *lines[1:]],
        1,
        "'a-1': no/where.wav: does not",
        4,
    ),
    "a command": ("wav.scp", lambda lines: [b"a-1 sox x.wav -t wav - |", *lines[1:]], 1, "a command, not a file", 4),
}


@pytest.mark.parametrize(("name", "change", "line", "says", "left"), REPAIRED.values(), ids=REPAIRED)
def test_found_and_fixed(data, validate, name, change, line, says, left):
    """The problem is named at its line with a cure; --fix says what it drops; then all is well and stays as it is."""
    good = everything(data)
    edit_lines(data / name, change)
    bad = (data / name).read_bytes()
    said, error = validate(data)
    found = [text for text in said.splitlines() if says in text]
    assert len(found) == 1 and "(fix: " in found[0] and "named above" in error, said
    assert line is None or found[0].startswith(f"{data / name}:{line}: "), found
    said, error = validate(data, "--fix")
    assert not error and f"{left} of " in said
    dropped = {"a-1"} if left == 4 else {"龙-1"} if name == "text" and says.startswith("'龙-1'") else set()
    assert {text.split("'")[1] for text in said.splitlines() if text.startswith("dropped")} == dropped
    assert (data / ".backup" / name).read_bytes() == bad
    fixed = everything(data)
    assert "valid:" in validate(data, "--fix")[0] and everything(data) == fixed
    if left == 5 and name != "text":  # nothing was lost, so the valid directory is back
        assert all(fixed[path][0] == good[path][0] for path in good)
    utts = read_table(data / "utt2spk").keys()
    assert all(read_table(data / table).keys() == utts for table in TABLES if table != "spk2utt")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf", b""], ids=["mark at the start", "no line end"])
def test_first_and_last_bytes(data, validate, content):
    edit(data / "text", lambda old: content + old if content else old[:-1])
    said, error = validate(data, "--no_audio")
    assert ("text:1: begins with a byte order mark" if content else "text:5: no line end") in said and error
    validate(data, "--fix")
    assert not validate(data)[1]


def test_missing_tables(data, validate, tmp_path):
    (data / "spk2utt").unlink()
    said, error = validate(data)
    assert "spk2utt: missing; needed are" in said and ": 1 problem," in error
    assert not validate(data, "--fix")[1] and not validate(data)[1]
    (data / "text").unlink()
    before = everything(data)
    assert "nothing is written; run stage 0 again" in validate(data, "--fix")[1]
    assert everything(data) == before
    assert "no such directory; stage 0 makes" in validate(tmp_path / "nothing")[1]


def test_many_problems_are_summed_up(data, validate):
    edit_lines(data / "text", lambda lines: [b"%03d x\r" % i for i in range(100)])
    said, error = validate(data, "--no_audio")
    assert said.count("ends in CR LF") == 20 and "text: 80 more like this: lines end in LF alone" in said
    assert "205 problems" in error  # 100 CR LF, 100 texts without the rest, 5 utterances without a text


def test_more_recordings_than_are_read_at_once(data, monkeypatch):
    monkeypatch.setattr("cosyvoice_ft.data_dir.CHUNK", 2)
    paths = read_table(data / "wav.scp")
    shutil.copy(paths["a-1"], paths["派-2"])
    headers = dict(read_headers(paths))
    assert list(headers) == list(paths) and headers["派-2"] == headers["a-1"] == 1.0
    assert DataDir(data).compare_audio(headers.items()) == pytest.approx(5 + 0.6 / 24)


def test_order_by_speaker_is_only_noted(data, validate):
    """Kaldi refuses it, this recipe does not need it."""
    edit(data / "utt2spk", lambda content: content.replace(b"a-1 a", b"a-1 z"))
    edit(data / "spk2utt", lambda content: b"a a-10 a-2\nz a-1\n" + content.split(b"\n", 1)[1])
    said, error = validate(data)
    assert "note: " in said and "SPEAKER-ID" in said and not error
