"""The recipe is the test: a copy of the tracked files, run as a new user runs it, and run wrongly."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import soundfile
import torch

from cosyvoice_ft import checkpoint
from cosyvoice_ft.conf import CONF_DIR
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import read_table


@pytest.fixture(scope="module")
def walked(clone, run):
    """What the screen showed of conf/tiny.yaml through all stages."""
    done = run("--conf", "conf/tiny.yaml")
    assert not [line for line in done.stderr.splitlines() if "Error" in line or "Traceback" in line], done.stderr
    return done


def test_all_stages(clone, walked):
    said = walked.stdout
    assert [f"stage {n}:" in said for n in range(-1, 9)] == [True] * 10
    assert "device cpu" in said or "device cuda" in said
    for line in ("100 of 100 utterances", "noise by design", "hear it:", "real-time factor", "seconds / expected"):
        assert line in said, line
    scores = json.loads((clone / "exp/tiny/synth/score.json").read_text(encoding="utf-8"))
    assert scores["sentences"] == {"spoken": 6, "base": 6, "natural": 10}
    assert scores["measures"]["duration"]["spoken - base"]["n"] == 6
    assert "exp/tiny/llm has 2 epochs, fewer than 3: all of them are averaged" in said
    for mode in ("sft", "zero_shot", "cross_lingual", "instruct"):
        assert f"  slt {mode}: 3 sentences, " in said, mode
    screen = said.split("stages -1 to 8 done")[1]
    for line in ("say more:", "train on:", "hand it over:   exp/tiny/model"):
        assert line in screen, line
    wavs = read_table(clone / "exp/tiny/synth/wav.scp")
    assert len(wavs) == 6 and read_table(clone / "exp/tiny/synth/text").keys() == wavs.keys()
    for path in wavs.values():
        wav, rate = soundfile.read(clone / path)
        assert rate == 24000 and len(wav) > 2400 and 0.001 < abs(wav).max() <= 1


def test_losses_fall(clone, walked):
    for part in ("llm", "flow"):
        facts = checkpoint.epochs(clone / "exp/tiny" / part)
        assert facts[2]["cv"]["loss"] < facts[1]["cv"]["loss"]
        assert {"loss_full", "loss_streaming"} <= facts[2]["cv"].keys()


def test_model_directory_is_complete(clone, walked):
    base, model = clone / "pretrained_models/tiny-cosyvoice2", clone / "exp/tiny/model"
    names = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    assert {p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()} == names | {
        "spk2info.pt",
        "model.json",
        "README.md",
    }
    for part in ("llm", "flow", "hift"):
        ours, theirs = checkpoint.load_weights(model / f"{part}.pt"), checkpoint.load_weights(base / f"{part}.pt")
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        assert all(torch.equal(ours[k], theirs[k]) for k in ours) == (part == "hift")
    speakers = checkpoint.load(model / "spk2info.pt")
    assert speakers.keys() == {"slt"} and speakers["slt"]["embedding"].shape == (1, 192)


def test_either_part_alone(clone, run, walked):
    """--tune llm and --tune flow make model directories of their own, with the base's other part."""
    base = clone / "pretrained_models/tiny-cosyvoice2"
    for tuned, other in (("llm", "flow"), ("flow", "llm")):
        said = run(
            "--conf", "conf/tiny.yaml", "--tune", tuned, "--stage", 6, "--stop_stage", 6, "--synth.texts="
        ).stdout
        model = clone / f"exp/tiny/model_{tuned}"
        assert f"wrote exp/tiny/model_{tuned}" in said
        assert (model / f"{other}.pt").read_bytes() == (base / f"{other}.pt").read_bytes()
        assert (model / f"{tuned}.pt").read_bytes() == (clone / f"exp/tiny/model/{tuned}.pt").read_bytes()
        assert (model / f"{tuned}.pt").read_bytes() != (base / f"{tuned}.pt").read_bytes()


def test_texts_may_be_unset(run, walked):
    """Stage 6 above does without them; stage 7 says what it needs."""
    error = run("--conf", "conf/tiny.yaml", "--synth.texts=", "--stage", 7, status=1).stderr
    assert error == "ERROR synth.texts is not set; name a file with one sentence a line: --synth.texts FILE\n"


def test_one_stage_again(clone, run, walked):
    before = (clone / "data/tiny/train/utt2speech_token.pt").read_bytes()
    said = run("--conf", "conf/tiny.yaml", "--stage", 2, "--stop_stage", 2).stdout
    assert "stage 2:" in said and "stage 1:" not in said and "stage 3:" not in said
    assert (clone / "data/tiny/train/utt2speech_token.pt").read_bytes() == before
    said = run("--conf", "conf/tiny.yaml", "--stage", 4, "--stop_stage", 4, "--train.llm.max_epoch", 3).stdout
    assert "goes on from" in said and "epoch 3 CV" in said and "epoch 2 CV" not in said


def test_help_is_made_from_the_script(run):
    said = run("--help").stdout
    for line in ("--conf", "--stop_stage", "--corpus", "-1  base model", "7   speak", "8   score"):
        assert line in said, line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--conff", "x"], "unknown option --conff"),
        (["--train.lrr", "1"], "unknown key 'train.lrr'; did you mean 'train.lr'"),
        (["--llm.sampling.top_q", "1"], "unknown key 'llm.sampling.top_q'"),
        (["--stage"], "--stage needs a value"),
        (["--stage", "two"], "--stage is 'two'; it is a whole number"),
        (["stage", "2"], "'stage' is not an option"),
        (["--tune", "voice"], "--tune is 'voice'; one of: llm_flow llm flow"),
        (["--conf", "conf/nobody.yaml"], "conf/nobody.yaml: no such conf"),
        (["--conf", "conf/paimon.yaml", "--stage", 0], "corpus.dir: 'corpora/paimon' is not a folder"),
        (["--conf", "conf/ljspeech.yaml", "--stage", 0], "corpus.dir: not set; say where the recordings are"),
        (
            ["--conf", "conf/ljspeech.yaml", "--stage", 3],
            "data/ljspeech/train/spk2embedding.pt is missing; stage 1 makes it",
        ),
        (["--conf", "conf/ljspeech.yaml", "--stage", 4], "data/ljspeech/train/parquet/data.list is missing; stage 3"),
        (["--conf", "conf/ljspeech.yaml", "--stage", 7], "exp/ljspeech/model/llm.pt is missing; stage 6"),
        (["--conf", "conf/ljspeech.yaml", "--stage", 8], "exp/ljspeech/synth/wav.scp is missing; stage 7"),
        (["--conf", "conf/ljspeech.yaml"], "pretrained_models/CosyVoice2-0.5B is missing"),
        (["--pretrained_dir", "nowhere"], "nowhere is missing"),
        (["--corpus.format", "pears", "--stage", 0], "corpus.format: 'pears' is unknown; one of: auto pairs libritts"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_line(run, words, says):
    done = run(*words, status=1)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], done.stderr


def test_empty_and_broken_corpora(run, tmp_path):
    (tmp_path / "empty").mkdir()
    stage0 = ["--conf", "conf/paimon.yaml", "--stage", 0, "--stop_stage", 0]
    error = run(*stage0, "--corpus", tmp_path / "empty", status=1).stderr
    assert "no recordings with texts found" in error
    for i in range(3):
        (tmp_path / "empty" / f"{i}.wav").write_bytes(b"not a wav")
        (tmp_path / "empty" / f"{i}.txt").write_text("你好")
    error = run(*stage0, "--corpus", tmp_path / "empty", status=1).stderr
    assert "3 of 3 recordings are broken" in error and "rejected.tsv" in error


def test_pairs_in_one_folder_and_in_parts(clone, run, root, tmp_path):
    """wav + .lab with Chinese names in one folder; train/ and test/ folders with the same names in both."""
    wav, rate = soundfile.read(root / "local/demo/wavs/demo_001.flac")

    def put(folder, names, cut=1000):
        folder.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(names):
            soundfile.write(folder / f"{name}.wav", wav[: -cut - i], rate)
            (folder / f"{name}.lab").write_text(f"你好，我是派蒙，{name}。\n", encoding="utf-8")

    put(tmp_path / "one", [f"派蒙 {i}" for i in range(10)])
    (tmp_path / "one" / "派蒙 0.normalized.txt").write_text("这一句更好。")
    stage0 = ["--conf", "conf/paimon.yaml", "--stage", 0, "--stop_stage", 0]
    run(*stage0, "--corpus", tmp_path / "one", "--name", "one")
    parts = [read_table(clone / "data/one" / part / "text") for part in ("train", "dev")]
    assert [len(part) for part in parts] == [9, 1]
    assert (parts[0] | parts[1])["派蒙_0"] == "这一句更好。"
    put(tmp_path / "two/train", ["a", "b"])
    put(tmp_path / "two/test", ["a"], cut=2000)
    run(*stage0, "--corpus", tmp_path / "two", "--name", "two")
    assert list(read_table(clone / "data/two/train/utt2spk")) == ["train-a", "train-b"]
    assert read_table(clone / "data/two/dev/utt2spk") == {"test-a": "paimon"}


def test_a_model_that_does_not_fit_is_named(clone, run, walked, tmp_path):
    """A conf that disagrees with the directory's yaml, and weights of another shape."""
    error = run("--conf", "conf/tiny.yaml", "--stage", 4, "--stop_stage", 4, "--flow.chunk_size", 20, status=1).stderr
    assert "flow.chunk_size is 20 in the conf, but" in error and "cosyvoice2.yaml" in error
    base = tmp_path / "base"
    shutil.copytree(clone / "pretrained_models/tiny-cosyvoice2", base)
    os.replace(base / "flow.pt", base / "llm.pt")
    words = ["--conf", "conf/tiny.yaml", "--pretrained_dir", base, "--name", "tiny", "--stage", 4, "--stop_stage", 4]
    assert "llm.pt: does not fit a cosyvoice2 llm" in run(*words, status=1).stderr


@pytest.fixture(scope="module")
def train_tool(clone):
    """The module tools/train.py of the copy, to be called without the seconds that a start takes."""
    spec = importlib.util.spec_from_file_location("train_tool", clone / "tools/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dry_run(clone, walked, train_tool, monkeypatch, capsys, tmp_path):
    """dry_run(part, words): what tools/train.py --dry_run says of the tiny recipe's data and base."""
    monkeypatch.chdir(clone)

    def call(part: str, *words: str) -> str:
        command = ["tools/train.py", part, "data/tiny", str(tmp_path / "out"), "--dry_run", *words]
        small = ["--pretrained_dir", "pretrained_models/tiny-cosyvoice2", "--device", "cpu"]
        small += ["--train.llm.max_batch", "1000", "--train.flow.max_batch", "1000"]
        monkeypatch.setattr("sys.argv", command + small)
        train_tool.main()
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("conf", sorted(path.name for path in CONF_DIR.glob("*.yaml")))
@pytest.mark.parametrize("part", ["llm", "flow"])
def test_every_shipped_conf_is_dry_run(dry_run, conf, part):
    said = dry_run(part, "--conf", f"conf/{conf}")
    assert re.search(r"dry run: loss \d+\.\d+, parameters without gradient: .*, peak memory \d+\.\d+ GB", said), said
    assert "memory, GB: weights" in said
    assert ("'freeze': ['^llm" in said) == (conf == "gpu12g.yaml" and part == "llm")


def test_deterministic_is_dry_run(dry_run):
    """Nothing in either model needs an algorithm that has no repeatable form."""
    try:
        for part in ("llm", "flow"):
            assert "dry run: loss" in dry_run(part, "--conf", "conf/tiny.yaml", "--train.deterministic", "true")
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_dev_set_is_an_error_before_training(dry_run, clone, monkeypatch):
    dev = clone / "data/tiny/dev/parquet/data.list"
    content = dev.read_text()
    try:
        dev.write_text("")
        with pytest.raises(BadInput, match=r"dev/parquet/data.list: .*stage"):
            dry_run("llm", "--conf", "conf/tiny.yaml")
    finally:
        dev.write_text(content)


def test_a_key_in_the_conf_is_refused(dry_run, train_tool, tmp_path):
    with pytest.raises(BadInput, match="swanlab: the name of a project; the key comes from `swanlab login`"):
        train_tool.summary_writer(tmp_path, {"api_key": "x"})


def test_killed_stage_5_ends_with_the_same_weights(clone, walked, tmp_path):
    """Killed twice in the middle of epochs, saved after every update: the weights of the run that was never killed."""
    command = [
        sys.executable,
        "tools/train.py",
        "flow",
        "data/tiny",
        str(tmp_path / "flow"),
        "--conf",
        "conf/tiny.yaml",
    ]
    command += ["--train.save_minutes=1e-6", "--train.log_every=1", "--train.listen_seconds=0"]
    options = {"cwd": clone, "text": True, "env": os.environ | {"PYTHONPATH": str(clone)}}
    for start in ("epoch 1 step 3", "epoch 2 step 9"):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)
        for line in child.stdout:
            if line.startswith(start):
                break
        child.kill()
        child.communicate()
    done = subprocess.run(command, capture_output=True, check=True, **options)
    assert re.search(r"goes on from .*: 1 of 2 epochs and [1-9]\d* updates done", done.stdout), done.stdout
    straight, killed = (checkpoint.load_weights(f / "epoch_2.pt") for f in (clone / "exp/tiny/flow", tmp_path / "flow"))
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
