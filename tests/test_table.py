"""Kaldi tables and whole-or-absent files."""

import subprocess
import sys

import pytest

from cosyvoice_ft.files import BadInput, fingerprint, lock, whole
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
        (b"a 1\nb \xcc\xec\n", ":2: not UTF-8; convert the file first: iconv -f GB18030 -t UTF-8"),
        ("a 1\n".encode("utf-16"), ":1: not UTF-8; convert the file first: iconv -f UTF-16 -t UTF-8"),
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


def test_what_only_some_corpora_have(tmp_path):
    """instruct and spk2prompt are written when there are any, and go when there are none; wav.scp comes last."""
    rows = [{"utt": u, "wav": f"{u}.wav", "text": "x", "spk": "s", "seconds": 1.0} for u in "ab"]
    write_data_dir(tmp_path, [rows[0] | {"instruct": "low"}, rows[1]], {"s": "p.wav", "other": "o.wav"})
    assert read_table(tmp_path / "instruct") == {"a": "low"} and read_table(tmp_path / "spk2prompt") == {"s": "p.wav"}
    write_data_dir(tmp_path, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spk2utt", "text", "utt2dur", "utt2spk", "wav.scp"]
    (tmp_path / "utt2dur").unlink()
    (tmp_path / "utt2dur").mkdir()  # cannot be replaced
    with pytest.raises(BadInput, match="utt2dur: cannot be written"):
        write_data_dir(tmp_path, rows)
    assert not (tmp_path / "wav.scp").exists()


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


def test_a_lock_is_for_one_process_and_ends_with_it(tmp_path, root):
    take = (
        f"from cosyvoice_ft.files import lock\nwith lock({str(tmp_path / 'x')!r}): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", take], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="x: another run is at work in it"), lock(tmp_path / "x"):
            pass
        other.kill()
    with lock(tmp_path / "x"):
        pass
