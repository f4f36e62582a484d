"""Kaldi tables and whole-or-absent files."""

import pytest

from cosyvoice_ft.files import BadInput, fingerprint, whole
from cosyvoice_ft.table import read_table, spk2utt, write_data_dir, write_table


def test_values_keep_their_blanks_and_keys_are_in_c_locale(tmp_path):
    table = {"b": "/a path/with  blanks.wav", "B": "1", "é": "2", "a": "派蒙 说"}
    write_table(tmp_path / "wav.scp", table)
    assert read_table(tmp_path / "wav.scp") == table
    assert [line.split(" ")[0] for line in (tmp_path / "wav.scp").read_text().splitlines()] == ["B", "a", "b", "é"]


def test_bom_crlf_tabs_and_empty_values(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffa\tone two\r\nb\r\nc  three \r\n".encode())
    assert read_table(tmp_path / "text") == {"a": "one two", "b": "", "c": "three"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a 1\nb \xcc\xec\n", ":2: not UTF-8"),
        (b"a 1\n\nb 2\n", ":2: empty line"),
        (b"a 1\na 2\n", ":2: key 'a' is there twice"),
    ],
)
def test_bad_tables_are_named_by_line(tmp_path, content, says):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(BadInput, match=says):
        read_table(tmp_path / "text")


def test_missing_table(tmp_path):
    with pytest.raises(BadInput, match="nothing"):
        read_table(tmp_path / "nothing")


def test_data_dir(tmp_path):
    rows = [{"utt": u, "wav": f"{u}.wav", "text": "x", "spk": s, "seconds": 1.5} for u, s in (("b", "s"), ("a", "s"))]
    write_data_dir(tmp_path, rows)
    assert (tmp_path / "spk2utt").read_text() == "s a b\n"
    assert (tmp_path / "utt2dur").read_text() == "a 1.500\nb 1.500\n"
    assert spk2utt({"u2": "x", "u1": "x", "u3": "w"}) == {"x": "u1 u2", "w": "u3"}


def test_whole_or_absent(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with whole(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_fingerprint_follows_content(tmp_path):
    (tmp_path / "a").write_bytes(b"same")
    (tmp_path / "b").write_bytes(b"same")
    (tmp_path / "c").write_bytes(b"other")
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 16
