"""Stage 0: every layout of a corpus is read, every recording is kept or left out by name, nothing is half-written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cosyvoice_ft import corpus, layout
from cosyvoice_ft.conf import load_conf
from cosyvoice_ft.corpus import Clip
from cosyvoice_ft.files import BadInput, lock
from cosyvoice_ft.table import read_table

RATE = 16000
SAID = "what is said in the recording"  # 24 letters: 1 to 12 s


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def put(path: Path, seed: int = 0, text: str | None = None) -> Path:
    """Write a recording of 3 s that no rule minds, and its text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(3, seed), RATE)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def stage0(run_tool, tmp_path):
    """stage0(folder, "--corpus.key", value ...): recognise the format, make tmp_path/data/NAME; the finished tool."""

    def run(folder, *words, name="mine", status=0, **kwargs):
        conf = tmp_path / f"{name}.yaml"
        if not conf.exists():
            conf.write_text("corpus: {}\n")
        words = ["--conf", conf, "--corpus.dir", folder, *words]
        done = run_tool("local/recognise_format.py", *words, status=None)
        if done.returncode == 0:
            tool = f"local/prepare_{done.stdout.strip()}.py"
            done = run_tool(tool, tmp_path / "data" / name, *words, status=None, **kwargs)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return run


def tables(out: Path) -> dict[str, dict[str, str]]:
    """{table: rows of train and dev together}."""
    names = {path.name for part in ("train", "dev") for path in (out / part).iterdir()}
    return {
        n: {k: v for p in ("train", "dev") if (out / p / n).exists() for k, v in read_table(out / p / n).items()}
        for n in names
    }


def rejected(out: Path) -> dict[str, list[str]]:
    """{utt: [kind, reason, value, wav]}."""
    head, *lines = (out / "rejected.tsv").read_text(encoding="utf-8").splitlines()
    assert head.split("\t") == ["utt", "kind", "reason", "value", "wav"]
    return {line.split("\t")[0]: line.split("\t")[1:] for line in lines}


def one_line(done, says):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ERROR ") and says in lines[0], done.stderr


def assert_kaldi_accepts(folder: Path) -> None:
    """The rules of utils/validate_data_dir.sh; the script itself where KALDI_ROOT says where Kaldi is."""
    utts = None
    for name in ("utt2spk", "wav.scp", "text", "utt2dur"):
        keys = [line.split(b" ")[0] for line in (folder / name).read_bytes().splitlines()]
        assert keys == sorted(set(keys)) and keys == (utts := utts or keys), name
    lines = (folder / "utt2spk").read_bytes().splitlines(keepends=True)
    assert lines == sorted(lines, key=lambda line: (line.split(b" ")[1], line)), "sorted by speaker too"
    turned = sorted((utt, spk) for spk, utts in read_table(folder / "spk2utt").items() for utt in utts.split())
    assert turned == sorted(read_table(folder / "utt2spk").items())
    assert list(read_table(folder / "spk2utt")) == sorted(read_table(folder / "spk2utt"), key=str.encode)
    if kaldi := os.environ.get("KALDI_ROOT"):
        script = ["bash", "utils/validate_data_dir.sh", "--no-feats", "--non-print", str(folder)]
        subprocess.run(script, cwd=Path(kaldi, "egs/wsj/s5"), check=True, capture_output=True)


# ---- layouts


def test_pairs(stage0, tmp_path):
    """Blanks, Chinese, BOM and CRLF; the first of three texts; folders are speakers, mac leftovers are nothing."""
    folder = tmp_path / "my corpus"
    for i in range(4):
        put(folder / "派蒙" / f"第 {i} 句.wav", i, f"\ufeff{SAID}\r\n and more \r\n")
        put(folder / "Tom_Sawyer" / "wavs" / f"{i}.flac", 10 + i).with_suffix(".lab").write_text(SAID)
    (folder / "派蒙" / "第 0 句.normalized.txt").write_text(SAID.upper())
    (folder / "派蒙" / "._第 0 句.wav").write_bytes(b"mac")
    said = stage0(folder).stdout
    found = tables(tmp_path / "data/mine")
    assert found["text"]["派蒙-第_1_句"] == SAID + " and more"
    assert found["text"]["派蒙-第_0_句"] == SAID.upper()
    assert found["utt2spk"]["派蒙-第_0_句"] == "派蒙" and found["utt2spk"]["Tom_Sawyer-0"] == "Tom_Sawyer"
    assert found["wav.scp"]["派蒙-第_3_句"] == str(folder / "派蒙/第 3 句.wav")
    assert "8 of 8 utterances" in said and "below 10 min" in said
    assert_kaldi_accepts(tmp_path / "data/mine/train")


def test_a_libritts_tree(stage0, tmp_path):
    for spk, chapter, part in (("84", "121123", "dev-clean"), ("845", "7", "train-clean-100"), ("9", "7", "train")):
        for i in range(3):
            path = tmp_path / f"tree/{part}/{spk}/{chapter}/{spk}_{chapter}_00_{i}.wav"
            put(path, int(spk) * 10 + i)
            path.with_suffix(".normalized.txt").write_text(SAID)
            path.with_suffix(".original.txt").write_text(SAID.upper())
    stage0(tmp_path / "tree")
    out = tmp_path / "data/mine"
    assert set(read_table(out / "dev/utt2spk").values()) == {"84"}
    assert set(read_table(out / "train/utt2spk").values()) == {"845", "9"}
    assert set(tables(out)["text"].values()) == {SAID}
    assert all(utt.startswith(f"{spk}-{spk}_") for utt, spk in tables(out)["utt2spk"].items())  # 84_ sorts after 845
    for part in ("train", "dev"):
        assert_kaldi_accepts(out / part)


HEARD, ALSO = 'Yes, "this" is said', "you hear this too"
TABLES = {  # name: its lines
    "quoted.csv": [
        "file_name,transcription,speaker",
        '"wavs/a b.wav","Yes, ""this"" is said",Ann Lee',
        f"wavs/派蒙.wav,{ALSO},Bo",
    ],
    "plain.tsv": ["path\tsentence\tclient_id", f"a b.wav\t{HEARD}\tAnn Lee", f"派蒙.wav\t{ALSO}\tBo"],
    "semi.csv": ["id;wav;text;spk", 'x;wavs/a b.wav;"Yes, ""this"" is said";Ann Lee', f"y;wavs/派蒙.wav;{ALSO};Bo"],
    "pipes.csv": ["audio_file|text|speaker_name", f"wavs/a b.wav|{HEARD}|Ann Lee", f"wavs/派蒙.wav|{ALSO}|Bo"],
    "one.list": [f"wavs/a b.wav|Ann Lee|{HEARD}", "", f"wavs/派蒙.wav|Bo|{ALSO}"],
    "sovits.list": [f"wavs/a b.wav|Ann Lee|EN|{HEARD}", f"wavs/派蒙.wav|Bo|ZH|{ALSO}"],
    "windows.list": [f"D:\\my voice\\wavs\\a b.wav|Ann Lee|{HEARD}", f"D:\\my voice\\wavs\\派蒙.wav|Bo|{ALSO}"],
    "moved.txt": [f"/nowhere/at/all/a b.wav|Ann Lee|{HEARD}", f"/nowhere/at/all/派蒙.wav|Bo|{ALSO}"],
    "nemo.jsonl": [
        json.dumps({"audio_filepath": "wavs/a b.wav", "text": HEARD, "speaker": "Ann Lee", "duration": 3}),
        json.dumps({"audio_filepath": "wavs/派蒙.wav", "text": ALSO, "speaker": "Bo", "duration": 3}),
    ],
    "nemo.json": [
        json.dumps({"ID": 1, "File": "wavs/a b.wav", "Text": HEARD, "spk": "Ann Lee"}, ensure_ascii=False),
        json.dumps({"ID": 2, "File": "wavs/派蒙.wav", "Text": ALSO, "spk": "Bo"}, ensure_ascii=False),
    ],
}


@pytest.mark.parametrize(("bom", "end"), [("", "\n"), ("\ufeff", "\r\n")], ids=["unix", "windows"])
@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name, bom, end):
    """The table is recognised, its recordings found, its texts and speakers read."""
    for i, stem in enumerate(("a b", "派蒙")):
        put(tmp_path / "wavs" / f"{stem}.wav", i)
    (tmp_path / name).write_text(bom + end.join(TABLES[name]) + end, encoding="utf-8", newline="")
    assert layout.named_tables(tmp_path, None) == [tmp_path / name]
    rows, sounds = list(layout.read_rows(tmp_path / name)), layout.SoundIndex(tmp_path)
    names = layout.at_home([row["audio"] for row in rows])
    assert [sounds.find(n, row["where"]) for n, row in zip(names, rows, strict=True)] == sounds.sounds
    assert [(row["speaker"], row["text"]) for row in rows] == [("Ann Lee", HEARD), ("Bo", ALSO)]


def test_a_list_with_everything(stage0, tmp_path):
    """jsonl with ids, instructions, prompts and splits; what the table lacks is named; recordings without a row too."""
    folder, rows = tmp_path / "corpus", []
    for i in range(12):
        put(folder / "clips" / f"{i}.wav", i)
        rows.append(
            {
                "id": f"utt/{i}",
                "path": f"{i}.wav",
                "text": SAID,
                "speaker": "AB"[i % 2],
                "split": "test" if i < 2 else "train",
            }
        )
    put(folder / "prompts" / "a.flac", 99)
    rows[2] |= {"instruct": "in a low\nvoice", "ref_audio": "prompts/a.flac"}
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    put(folder / "forgotten.wav", 50)
    said = stage0(folder).stdout
    out = tmp_path / "data/mine"
    assert list(read_table(out / "dev/text")) == ["A-utt-0", "B-utt-1"]
    assert tables(out)["instruct"] == {"A-utt-2": "in a low voice"}
    assert read_table(out / "train/spk2prompt") == {"A": str(folder / "prompts/a.flac")}
    assert "not in the table: 1 more" in said and "forgotten.wav" in said
    rows[2]["ref_audio"] = "prompts/b.flac"
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_line(stage0(folder, status=1), "prompts/b.flac: does not exist")


def test_an_existing_kaldi_directory(stage0, tmp_path):
    """What stage 0 writes is read again as it is; other people's has to be complete and of files."""
    for i in range(6):
        put(tmp_path / f"corpus/{'ab'[i % 2]}/{i}.wav", i, SAID)
    stage0(tmp_path / "corpus")
    first = tmp_path / "data/mine"
    stage0(first, name="again")
    for part in ("train", "dev"):
        for path in (first / part).iterdir():
            assert path.read_bytes() == (tmp_path / "data/again" / part / path.name).read_bytes()
    one_line(stage0(first, "--name", "mine", status=1), "where stage 0 writes, lie in one another")
    broken = shutil.copytree(first / "train", tmp_path / "broken")
    table = (broken / "wav.scp").read_text()
    (broken / "wav.scp").write_text(table.splitlines()[0] + "\n")
    one_line(stage0(broken, name="b", status=1), "wav.scp and text differ in 4 utterances")
    (broken / "wav.scp").write_text("".join(f"{line} |\n" for line in table.splitlines()))
    one_line(stage0(broken, name="b", status=1), "is a command; write what it says to a file")
    (broken / "segments").write_text("a b 0 1\n")
    one_line(stage0(broken, name="b", status=1), "extract_wav_segments_data_dir.sh")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.csv": "path,text\n", "etc/b.tsv": "path\ttext\n"}, "several tables; say which, one or more: "),
        ({"a.csv": "path,text\n", "x.wav": "", "x.txt": "yes"}, "could be table (a.csv) or pairs (x.wav x.txt); say"),
        ({"x.m4a": "", "README.txt": "a|b"}, "no recordings with texts found (it holds 1 .m4a, 1 .txt)"),
        ({}, "no recordings with texts found (it holds no files)"),
    ],
)  # fmt: skip
def test_what_is_not_unmistakable(stage0, tmp_path, files, says):
    (tmp_path / "corpus/etc").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "corpus" / name).write_text(content)
    one_line(stage0(tmp_path / "corpus", status=1), says)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"path,text\na.wav,yes\nb.wav,\xc4\xe3\n", "a.csv:3: not UTF-8; convert the file first: iconv"),
        ("a.csv", b"path,text\na.wav,yes,no\n", "a.csv:2: 3 columns, the header row has 2"),
        ("a.csv", b'path,text\na.wav,"yes" no\n', "a.csv:2: not valid csv"),
        ("a.csv", b"path,text\na.wav,yes\n,no\n", "a.csv:3: no audio"),
        ("a.csv", b"path,words\na.wav,yes\n", "a.csv:1: neither a header row"),
        ("a.jsonl", b'{"path": "a.wav", "text": "yes"}\n{"path": "b.wav"}\n', "a.jsonl:2: a table needs a column"),
        ("a.jsonl", b'{"path": "a.wav", "text": "yes"}\n{"path"\n', "a.jsonl:2: not valid json"),
        ("a.jsonl", b'{"path": "a.wav", "text": ["yes"]}\n', "a.jsonl:1: text is a list"),
        ("a.list", b"a.wav|yes\na.wav|x|en|yes|no\n", "a.list:2: 'a.wav|x|en|yes|no' is none of path|text"),
        ("metadata.csv", b"a|yes\nb\n", "metadata.csv:2: 'b' is not 'id|text'"),
        ("a.transcription", b"YES (a)\nNO\n", "a.transcription:2: 'NO' is not 'TEXT (id)'"),
    ],
)  # fmt: skip
def test_bad_tables_are_named_by_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        list(layout.read_rows(tmp_path / name))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_bad_texts_and_names(stage0, tmp_path):
    put(tmp_path / "gbk/a.wav").with_suffix(".txt").write_bytes("你好".encode("gb18030"))
    one_line(
        stage0(tmp_path / "gbk", status=1), "a.txt:1: not UTF-8; convert the file first: iconv -f GB18030 -t UTF-8"
    )
    put(tmp_path / "utf16/a.wav").with_suffix(".txt").write_bytes("hello".encode("utf-16"))
    one_line(
        stage0(tmp_path / "utf16", status=1), "a.txt:1: not UTF-8; convert the file first: iconv -f UTF-16 -t UTF-8"
    )
    os.makedirs(os.fsencode(tmp_path / "name") + b"/")
    (Path(os.fsdecode(os.fsencode(tmp_path / "name") + b"/\xc4\xe3.wav"))).write_bytes(b"")
    one_line(stage0(tmp_path / "name", status=1), "the name is not UTF-8 text on one line; rename it")


def test_a_name_that_two_files_have(tmp_path):
    put(tmp_path / "s1/a.wav")
    put(tmp_path / "s2/a.wav", 1)
    sounds = layout.SoundIndex(tmp_path)
    assert sounds.find("s2/a", f"{tmp_path}/t:1") == tmp_path / "s2/a.wav"
    assert sounds.find("S2/A.WAV", f"{tmp_path}/t:1") == tmp_path / "s2/a.wav"
    assert sounds.find("s3/a.wav", f"{tmp_path}/t:1") == tmp_path / "s3/a.wav"
    with pytest.raises(BadInput, match=r"t:1: 'a\.wav' could be .*s1/a\.wav or .*s2/a\.wav; give more of the path"):
        sounds.find("a.wav", f"{tmp_path}/t:1")


@pytest.mark.parametrize("tool", ["recognise_format", "prepare_pairs", "prepare_table", "prepare_kaldi"])
def test_help_shows_a_command_that_names_the_tool(run_tool, tool):
    assert f"python local/{tool}.py" in run_tool(f"local/{tool}.py", "--help").stdout


# ---- names


@pytest.fixture
def settings(tmp_path):
    """settings(key=value ...): the whole conf with these keys of `corpus`."""

    def make(**own):
        (tmp_path / "mine.yaml").write_text(json.dumps({"corpus": {"dir": str(tmp_path)} | own}))
        return load_conf(tmp_path / "mine.yaml")

    return make


@pytest.fixture
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "mine"


def named(clips, made):
    corpus.name_clips(clips, made["corpus"], made["name"])
    return [(clip.utt, clip.spk) for clip in clips]


def test_the_speaker_comes_from_the_conf_the_table_the_folder_or_the_name(settings, tmp_path):
    def clips():
        return [Clip(tmp_path / "wavs/amy_1.wav", "", spk="Ann Lee"), Clip(tmp_path / "bo/wav48/amy_2.wav", "")]

    assert [spk for _, spk in named(clips(), settings(speaker="me"))] == ["me", "me"]
    assert [spk for _, spk in named(clips(), settings())] == ["Ann_Lee", "bo"]
    assert named([Clip(tmp_path / "wavs/amy_1.wav", ""), Clip(tmp_path / "train/bo_2.wav", "")], settings()) == [
        ("amy_1", "mine"),
        ("bo_2", "mine"),
    ]


def test_ids(settings, tmp_path):
    """A single speaker's stay as they are; with several, order by id is order by speaker."""
    one = [Clip(tmp_path / "a b/1.wav", ""), Clip(tmp_path / "c/1.wav", "")]
    assert named(one, settings(speaker="s")) == [("a_b-1", "s"), ("c-1", "s")]
    assert named([Clip(tmp_path / "a/1.wav", ""), Clip(tmp_path / "c/2.wav", "")], settings(speaker="s")) == [
        ("1", "s"),
        ("2", "s"),
    ]
    several = [Clip(tmp_path / f"{s}/{s}_{i}.wav", "") for i in range(2) for s in ("p225", "p226")]
    assert named(several, settings())[0] == ("p225_0", "p225")
    prefix = [Clip(tmp_path / f"{s}/{s}_{i}.wav", "") for i in range(2) for s in ("p22", "p225")]
    assert named(prefix, settings())[:2] == [("p22-p22_0", "p22"), ("p225-p225_0", "p225")]
    with pytest.raises(BadInput, match="speakers 'a' and 'a-b' do not sort as their utterances do; rename one"):
        named([Clip(tmp_path / "a/x.wav", ""), Clip(tmp_path / "a-b/c.wav", "")], settings())


# ---- rules


def gap(wav: np.ndarray) -> np.ndarray:
    return np.concatenate([wav, np.zeros(3 * len(wav), np.float32)])


def cut(name: str, folder: Path) -> None:
    soundfile.write(folder / name, noise(3), RATE, format="NIST" if name.endswith("sph") else None)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) * 2 // 3])


def make_recordings(folder: Path) -> dict[str, str]:
    """Write recordings of all kinds; return {file: the rule that it breaks, "" for none}."""

    def write(name, wav, rate=RATE, **kwargs):
        soundfile.write(folder / name, wav, rate, **kwargs)

    write("stereo.wav", np.stack([noise(3, 1), noise(3, 2)], 1))
    write("24bit.wav", noise(3, 3), subtype="PCM_24")
    write("float.wav", 20 * noise(3, 4), subtype="FLOAT")
    write("48k.flac", noise(9, 5), 48000)
    write("44k.mp3", noise(9, 6), 44100)
    write("vorbis.ogg", noise(3, 7))
    write("opus.opus", noise(9, 8), 48000, format="OGG", subtype="OPUS")
    write("nist.sph", noise(3, 9), format="NIST")
    write("quiet.wav", noise(3, 10) / 10)
    write("8k.wav", noise(3, 11), 8000)
    write("long.wav", noise(31, 12))
    write("hour.flac", np.zeros(3600 * RATE, np.int16))
    write("short.wav", noise(0.4, 13))
    write("clipped.wav", np.clip(noise(3, 14) * 10 ** (25 / 20), -1, 1))
    write("quiet_clipped.wav", np.clip(noise(3, 15), -0.15, 0.15))
    write("silent.wav", noise(3, 16) / 1000)
    write("zero.wav", np.zeros(3 * RATE))
    write("gap.wav", gap(noise(2, 17)))
    write("same.flac", soundfile.read(folder / "nist.sph", dtype="int16")[0])
    write("none.wav", np.zeros(0))
    write("nan.wav", np.full(RATE, np.nan), subtype="FLOAT")
    for name in ("cut.wav", "cut.flac", "cut.mp3", "cut.ogg", "cut.sph"):
        cut(name, folder)
    (folder / "empty.wav").touch()
    (folder / "directory.wav").mkdir()
    (folder / "text.wav").write_text("no sound")
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    reasons = {
        "rate": "8k.wav", "long": "long.wav hour.flac", "short": "short.wav",
        "clipped": "clipped.wav quiet_clipped.wav",
        "silent": "silent.wav zero.wav", "silence": "gap.wav", "same audio": "same.flac", "missing": "gone.wav",
        "undecodable": "none.wav nan.wav empty.wav directory.wav text.wav",
        "truncated": "cut.wav cut.flac cut.mp3 cut.ogg cut.sph",
    }  # fmt: skip
    return {name: "" for name in (p.name for p in folder.iterdir())} | {
        n: r for r, ns in reasons.items() for n in ns.split()
    }


def test_every_recording_is_kept_or_left_out_by_its_rule(settings, tmp_path, out):
    folder = tmp_path / "corpus"
    folder.mkdir()
    made = make_recordings(folder)
    clips = [Clip(folder / name, SAID, utt=name) for name in made]
    clips += [Clip(folder / "nist.sph", SAID, utt="stereo.wav")]
    clips += [
        Clip(folder / "24bit.wav", text, utt=text) for text in ("", "?!", "yes {NICKNAME} yes", "<color=#fff>yes yes")
    ]
    with pytest.raises(BadInput, match=r"14 of 35 recordings are broken, more than 5% \(5 undecodable, 5 truncated"):
        corpus.prepare(clips, out, settings())
    assert not (tmp_path / "train").exists()
    with pytest.raises(BadInput, match=r"only 9 of 35 recordings can be trained on, less than 60%"):
        corpus.prepare(clips, out, settings(max_broken=0.5))
    said = corpus.prepare(clips, out, settings(max_broken=0.5, min_kept=0.0))
    found = {utt: row[1] for utt, row in rejected(out).items()}
    expected = {name: reason for name, reason in made.items() if reason}
    expected |= {"stereo.wav": "duplicate id", "": "no text", "?!": "no text"}
    expected |= {"yes_{NICKNAME}_yes": "placeholder", "<color=#fff>yes_yes": "placeholder"}
    assert found == {utt or "24bit": reason for utt, reason in expected.items()}
    assert tables(out)["wav.scp"].keys() == {name for name, reason in made.items() if not reason}
    kinds = {reason: kind for kind, reason, *_ in rejected(out).values()}
    assert {r for r, kind in kinds.items() if kind == "broken"} == set(corpus.BROKEN)
    assert "  left out 2 (long): longer than 30 s: cut it at a pause" in said and "9 of 35 utterances" in said
    assert "  kept 1 (quiet): no sample above 0.1" in said
    assert rejected(out)["8k.wav"] == ["broken", "rate", "8000 Hz", str(folder / "8k.wav")]


def test_without_permission(settings):
    """A file that must not be read is broken; a folder that must not be listed or written stops the stage."""
    own = settings()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder / "a.wav").chmod(0)
        (folder / "locked").mkdir(0)
        folder.chmod(0o755)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may do everything
        try:
            found = corpus.inspect(Clip(folder / "a.wav", SAID), own["corpus"], folder)
            with pytest.raises(BadInput, match=r"locked: cannot be listed \(Permission denied\)"):
                layout.find_sounds(folder)
            with pytest.raises(BadInput, match=r"out: cannot be written \(Permission denied\)"):
                corpus.prepare([Clip(folder / "a.wav", SAID)], folder / "out", own)
        finally:
            os.seteuid(user)
    assert found.reason == "undecodable" and "Permission denied" in found.value


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("a" * 50, 2, 25),
        ("派" * 18, 2, 18),
        ("カタひらー 가나", 7 / 9, 7),
        ("2024", 4 / 25, 8),
        ("派蒙 says 3", 2 / 9 + 5 / 25, 2 + 8 / 2),
        ("派、・ 蒙!", 2 / 9, 2),
    ],
)
def test_speech_rate(settings, text, least, most):
    fastest, slowest, _ = corpus.speech_seconds(text, settings()["corpus"])
    assert (fastest, slowest) == pytest.approx((least, most))


def test_same_audio_can_be_kept(settings, tmp_path, out):
    clips = [Clip(put(tmp_path / f"{i}.wav"), SAID) for i in range(3)]
    assert "3 of 3" in corpus.prepare(clips, out, settings(same_audio="keep"))


def test_what_is_held_out(settings, tmp_path, out):
    clips = [
        Clip(put(tmp_path / f"{p}/{i}{p}.wav", hash(p) % 99 + i), SAID) for i in range(2) for p in ("test-other", "x")
    ]
    corpus.prepare(clips, out, settings(speaker="s"))
    assert list(read_table(out / "dev/text")) == ["0test-other", "1test-other"]
    with pytest.raises(BadInput, match="only 1 of 1 recordings can be trained on, fewer than 2; record more"):
        corpus.prepare(clips[:1], out, settings())


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"max_seconds": 40.0}, "corpus.max_seconds is 40; the speech tokenizer takes 30 at most"),
        ({"same_audio": "maybe"}, "corpus.same_audio: 'maybe' is unknown; one of: reject keep"),
        ({"trim": True}, "corpus.trim is True; it is the seconds of silence to leave: 0.2, or nothing"),
        ({"level": 23}, "corpus.level is 23; it is in dBFS: -23, or nothing"),
        ({"min_peak": None}, "corpus.min_peak is empty; it is a number"),
        ({"letters_per_second": [2.0]}, "corpus.letters_per_second is [2.0]; it is the slowest and the fastest"),
    ],
)
def test_bad_settings(settings, tmp_path, out, own, says):
    with pytest.raises(BadInput) as caught:
        corpus.prepare([Clip(tmp_path / "a.wav", SAID)], out, settings(**own))
    assert says in str(caught.value)


# ---- the wave that all read


def test_trimmed_and_levelled(settings, tmp_path, out):
    clips = []
    for i in range(3):
        wav = np.concatenate([np.zeros(4 * RATE), noise(3, i) / 20, np.zeros(8 * RATE)])
        soundfile.write(tmp_path / f"{i}.flac", wav, RATE, subtype="PCM_24")
        clips.append(Clip(tmp_path / f"{i}.flac", SAID))
    with pytest.raises(BadInput, match="3 silence"):
        corpus.prepare(clips, out, settings())
    corpus.prepare(clips, out, settings(trim=0.2, level=-23.0))
    for utt, path in tables(out)["wav.scp"].items():
        assert path == str(out / "wav" / f"{utt}.wav")
        wav, rate = soundfile.read(path)
        assert rate == RATE and len(wav) == round(3.4 * RATE)
        assert 20 * np.log10(np.sqrt(np.mean(wav[3200:-3200] ** 2))) == pytest.approx(-23, abs=0.1)
        assert tables(out)["utt2dur"][utt] == "3.400"
    corpus.prepare(clips, out, settings(trim=0.2, level=-1.0))
    assert abs(soundfile.read(out / "wav/0.wav")[0]).max() == pytest.approx(0.95, abs=1e-3)
    for clip in clips:
        put(clip.wav.with_suffix(".wav"), int(clip.wav.stem))
    corpus.prepare([Clip(clip.wav.with_suffix(".wav"), SAID) for clip in clips], out, settings())
    assert not (out / "wav").exists()


# ---- whole or absent


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


@pytest.fixture
def many(tmp_path):
    """A folder of 120 times the same recording."""
    put(tmp_path / "many/000.wav", 0, SAID)
    for i in range(1, 120):
        os.link(tmp_path / "many/000.wav", tmp_path / f"many/{i:03d}.wav")
        os.link(tmp_path / "many/000.txt", tmp_path / f"many/{i:03d}.txt")
    return tmp_path / "many"


def test_twice_the_same_bytes_and_kill_9_leaves_nothing(root, tmp_path, many, stage0):
    words = ["--corpus.same_audio", "keep", "--corpus.level", "-23"]
    stage0(many, *words)
    out = tmp_path / "data/mine"
    first = content(out)
    assert len(first) == 120 + 10 + 1
    stage0(many, *words, "--nj", 1)
    assert content(out) == first
    shutil.rmtree(out)
    command = [sys.executable, "local/prepare_pairs.py", str(out), "--conf", str(tmp_path / "mine.yaml")]
    command += ["--corpus.dir", str(many), *words, "--nj", "1"]
    with subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, text=True) as process:
        while len(list(out.glob(".wav.part/*.wav"))) < 20 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (out / ".wav.part").exists() and not (out / "train").exists() and not (out / "wav").exists()
    (out / "train").mkdir()
    (out / "train/.text.123.part").write_text("half")
    stage0(many, *words)
    assert content(out) == first and not (out / ".wav.part").exists()


def test_two_runs_at_once(tmp_path, many, stage0):
    with lock(tmp_path / "data/mine"):
        one_line(stage0(many, "--corpus.same_audio", "keep", status=1), "data/mine: another run is at work in it")
    stage0(many, "--corpus.same_audio", "keep")


@pytest.mark.parametrize("words", [[], ["--corpus.level", "-23"]], ids=["tables", "waves"])
def test_a_full_disk(tmp_path, many, stage0, words):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # bytes of a file

    done = stage0(many, "--corpus.same_audio", "keep", *words, status=1, preexec_fn=full)
    one_line(done, "cannot be written (File too large); free space")
    assert not [path for path in (tmp_path / "data").rglob("*") if "part" in path.name or path.match("train/wav.scp")]


def test_a_target_that_cannot_be_written(tmp_path, many, stage0):
    (tmp_path / "data").write_text("a file")
    one_line(stage0(many, status=1), "data/mine: cannot be written (Not a directory)")


# ---- real recordings

SETS = {  # conf, kept, left out {utterance: reason}, speakers
    "ljspeech-200": ({}, 200, {}, 1),
    "librispeech-10spk": ({}, 60, {}, 10),
    "vctk-4spk": ({}, 40, {}, 4),
    "aishell-zh": ({}, 64, {f"S0252-BAC009S0252W0{n}": "speech rate" for n in (497, 498, 499, 500)}, 2),  # APP, spelled
    "mini-an4": ({"table": ["etc/an4_train.transcription", "etc/an4_test.transcription"]}, 7, {}, 5),
    "edge-cases": (
        {"max_broken": 0.5, "min_kept": 0.4},
        9,
        {
            "corrupt-bad": "undecodable", "corrupt-evil": "undecodable", "corrupt-null": "undecodable",
            "corrupt-awful": "rate", "8k-mono": "rate", "LJ001-0001": "duplicate id",
            "5703-47212-0000": "no text", "common_voice_en_651325": "no text",
            "common_voice_en_22058264": "silence", "common_voice_en_22058267": "speech rate",
        },
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_real_corpora(stage0, speech_dir, tmp_path, name):
    """Each with a conf of a few lines and no format in it."""
    own, kept, left_out, speakers = SETS[name]
    (tmp_path / "mine.yaml").write_text(json.dumps({"corpus": own}))
    said = stage0(speech_dir / name).stdout
    assert f"{kept} of {kept + len(left_out)} utterances" in said
    found = tables(tmp_path / "data/mine")
    assert len(found["text"]) == kept and len(found["spk2utt"]) == speakers
    assert {utt: row[1] for utt, row in rejected(tmp_path / "data/mine").items()} == left_out
    for part in ("train", "dev"):
        assert_kaldi_accepts(tmp_path / "data/mine" / part)


def test_real_corpora_that_do_not_load_by_themselves(stage0, speech_dir):
    one_line(stage0(speech_dir / "mini-an4", status=1), "--corpus.table '[etc/an4_test.transcription, etc/an4_train.")
    one_line(stage0(speech_dir / "edge-cases", status=1), "6 of 19 recordings are broken, more than 5%")
    one_line(stage0(speech_dir / "librispeech-251spk", status=1), "no recordings with texts found (it holds 251 .flac")
    one_line(stage0(speech_dir, status=1), "several tables; say which, one or more: --corpus.table")


def test_an4_in_a_conf(stage0, speech_dir, tmp_path):
    """Texts without their marks, speakers by folder, the test list held out."""
    (tmp_path / "mine.yaml").write_text(json.dumps({"corpus": SETS["mini-an4"][0]}))
    stage0(speech_dir / "mini-an4")
    assert read_table(tmp_path / "data/mine/train/text")["fash-an251-fash-b"] == "YES"
    assert set(read_table(tmp_path / "data/mine/dev/utt2spk").values()) == {"fcaw", "mmxg"}


def test_clipping_tells_natural_from_clipped(settings, speech_dir):
    """No natural recording is taken for clipped; driven 10 dB over full scale nearly all are."""
    limit, caught, total = settings()["corpus"]["max_clipped"], 0, 0
    for path in layout.find_sounds(speech_dir)[::3]:
        if path.name.startswith(("corrupt", "8k")):
            continue
        wav = corpus.audio.load_wav(path).numpy()
        assert corpus.share_at_peak(wav) < limit / 5, path
        caught += corpus.share_at_peak(np.clip(wav / abs(wav).max() * 10 ** (10 / 20), -1, 1)) > limit
        total += 1
    assert total > 200 and caught > 0.98 * total
