"""The command-line tools: help, one line for bad input, nothing half-written."""

import os
import stat

import numpy as np
import pytest
import soundfile

from cosyvoice_ft import device
from cosyvoice_ft.files import BadInput

TOOLS = [
    "average",
    "extract_embedding",
    "extract_speech_token",
    "make_model_dir",
    "make_parquet",
    "check_model_dir",
    "fetch_model",
    "show_result",
    "try_voice",
    "validate_data_dir",
    "print_conf",
    "score",
    "synthesize",
    "train",
]
OTHERS = ["local/make_tiny_base.py", "tests/bench/synthesis.py"]


@pytest.fixture
def clips(tmp_path, root, run_tool):
    """data/{train,dev} of 12 shipped recordings, stage 0 done; also the words of the conf that all tools get."""
    corpus = tmp_path / "corpus"
    (corpus / "wavs").mkdir(parents=True)
    lines = (root / "local/demo/metadata.csv").read_text().splitlines()[:12]
    for line in lines:
        utt = line.split("|")[0]
        os.link(root / f"local/demo/wavs/{utt}.flac", corpus / f"wavs/{utt}.flac")
    (corpus / "metadata.csv").write_text("\n".join(lines))
    words = ["--conf", "conf/tiny.yaml", f"--corpus.dir={corpus}", f"--pretrained_dir={tmp_path / 'base'}"]
    run_tool("local/prepare_table.py", tmp_path / "data", *words)
    return tmp_path / "data", words


@pytest.fixture
def base(clips, tiny_base):
    link = clips[0].parent / "base"
    link.symlink_to(tiny_base)
    return link


@pytest.mark.parametrize("tool", [f"tools/{name}.py" for name in TOOLS] + OTHERS)
def test_help_shows_a_command_that_names_the_tool(run_tool, tool):
    said = run_tool(tool, "--help").stdout
    assert f"python {tool}" in said and len(said.splitlines()) > 8


def one_line(done, says):
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("left out")]
    assert len(lines) == 1 and says in lines[0], done.stderr


def test_a_card_that_cannot_be_used_is_an_error(run_tool, clips, base, tmp_path):
    """nvidia-smi shows a card, torch and onnxruntime are CPU builds."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a card that torch can use; the test is for one it cannot")
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho NVIDIA Made-up 9000\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    data, words = clips
    command = ["tools/extract_embedding.py", data / "train", data / "dev", *words]
    done = run_tool(*command, status=1, env=env)
    one_line(done, "NVIDIA Made-up 9000 cannot be used by torch")
    assert "--device cpu" in done.stderr
    assert "device cpu" in run_tool(*command, "--device", "cpu", env=env).stdout


@pytest.mark.parametrize(
    "name, says", [("gpu", "'gpu' is unknown; one of: auto, cpu, cuda"), ("cuda:99", "cuda:99, and")]
)
def test_a_device_that_is_not_there(name, says):
    with pytest.raises(BadInput, match=says):
        device.torch_device(name)


def test_a_corrupt_recording_costs_one_utterance(run_tool, clips, base):
    """The file breaks between stage 0 and stage 1: named, the rest done; above 5 % nothing is written."""
    data, words = clips
    lines = (data / "train/wav.scp").read_text().splitlines()
    utt = lines[0].split()[0]
    (data / "broken.wav").write_bytes(b"RIFF")
    (data / "train/wav.scp").write_text("\n".join([f"{utt} {data / 'broken.wav'}", *lines[1:]]) + "\n")
    command = ["tools/extract_speech_token.py", data / "train", data / "dev", *words]
    done = run_tool(*command, status=1)
    assert f"left out {utt}: " in done.stderr
    one_line(done, "1 of 12 utterances failed, more than 5%")
    assert not (data / "train/utt2speech_token.pt").exists()


def test_stage_3_refuses_a_recording_that_changed(run_tool, clips, base):
    data, words = clips
    for tool in ("extract_embedding", "extract_speech_token"):
        run_tool(f"tools/{tool}.py", data / "train", data / "dev", *words)
    lines = (data / "train/wav.scp").read_text().splitlines()
    utt = lines[0].split()[0]
    soundfile.write(data / "other.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 48000), 24000)
    (data / "train/wav.scp").write_text("\n".join([f"{utt} {data / 'other.wav'}", *lines[1:]]) + "\n")
    done = run_tool("tools/make_parquet.py", data / "train", *words, status=1)
    assert "the recording changed, run stage 1" in done.stderr
    assert not (data / "train/parquet").exists()


def test_missing_inputs_are_named(run_tool, clips, base, tmp_path):
    data, words = clips
    one_line(run_tool("tools/make_parquet.py", data / "train", *words, status=1), "utt2embedding.pt: no such file")
    one_line(run_tool("tools/train.py", "llm", data, tmp_path / "out", *words, status=1), "run stage 3")
    one_line(run_tool("tools/average.py", tmp_path, status=1), "not a training; name exp/NAME/llm or exp/NAME/flow")
    (tmp_path / "llm").mkdir()
    one_line(run_tool("tools/average.py", tmp_path / "llm", status=1), "no epoch_N.pt")
    one_line(run_tool("tools/extract_embedding.py", tmp_path / "nothing", *words, status=1), "utt2spk: cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", "\n \n", "no sentences"),
        ("t.json", '{"a": ["b",]}', "t.json:1: not valid json"),
        ("t.json", '["a"]', "a tts_text.json is an object"),
        ("t.json", '{\n"nobody": ["Hello."]}', "t.json:2: speaker 'nobody' is unknown; known: none"),
        ("none.txt", None, "none.txt: cannot be read"),
    ],
)
def test_bad_texts(run_tool, tiny_base, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    command = ["tools/synthesize.py", tiny_base, tmp_path / name, tmp_path / "out", "--conf", "conf/tiny.yaml"]
    one_line(run_tool(*command, status=1), says)
    assert not (tmp_path / "out").exists()


def test_model_dir_needs_a_complete_base(run_tool, tmp_path):
    (tmp_path / "base").mkdir()
    words = [tmp_path / "data", "--conf", "conf/tiny.yaml", f"--pretrained_dir={tmp_path / 'base'}"]
    done = run_tool("tools/make_model_dir.py", tmp_path / "model", *words, status=1)
    one_line(done, "lacks cosyvoice2.yaml, llm.pt, flow.pt, hift.pt")
    assert not (tmp_path / "model").exists()


def test_tiny_base_is_the_same_every_time(run_tool, tiny_base, tmp_path):
    run_tool("local/make_tiny_base.py", tmp_path / "again")
    for path in tiny_base.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tiny_base)).read_bytes(), path.name
    one_line(run_tool("local/make_tiny_base.py", tmp_path / "again", status=1), "exists already")
