"""Stage -1 and the check of model directories: whole or absent, and what is wrong named with its cure."""

import importlib.util
import inspect
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from cosyvoice_ft import checkpoint, model_dir
from cosyvoice_ft.files import BadInput

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2024669519\n"


@pytest.fixture
def base(tiny_base, tmp_path):
    """A complete model directory in a folder with a blank and Chinese in its name, to be broken."""
    return shutil.copytree(tiny_base, tmp_path / "派蒙 models" / "base")


@pytest.fixture
def tool(root, monkeypatch, capsys):
    """tool(name, words...): (what it printed, the error or "")."""

    def run(name, *words):
        spec = importlib.util.spec_from_file_location(name, root / f"tools/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        monkeypatch.chdir(root)
        error = ""
        try:
            module.main()
        except BadInput as bad:
            error = str(bad)
        return capsys.readouterr().out, error

    return run


def states(said):
    """{file: state} of the printed table."""
    rows = [line.split(maxsplit=1) for line in said.splitlines()[1:]]
    return {row[0]: row[1].lstrip("0123456789.- ").removeprefix("B ").removeprefix("kB ").strip() for row in rows}


def cut(path, share=0.7):
    os.truncate(path, int(path.stat().st_size * share))


def rename_key(path, old, new):
    weights = checkpoint.load_weights(path)
    checkpoint.save(path, {name.replace(old, new): value.clone() for name, value in weights.items()})


def test_a_complete_directory(tool, base):
    said, error = tool("check_model_dir", base)
    assert not error and "CosyVoice2, 12 files, 17.4 MB: complete" in said
    assert "M parameters, they fit" in states(said)["llm.pt"]


class Foreign:
    """Unpickled, it would run code."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def foreign(path):
    torch.save({"weight": Foreign()}, path)


def transposed(path):
    name = {"llm.pt": "llm_decoder.weight", "flow.pt": "encoder_proj.weight"}[path.name]
    weights = checkpoint.load_weights(path)
    checkpoint.save(path, weights | {name: weights[name].T.contiguous()})


def of_other_rank(path):
    checkpoint.save(path, {name: value.flatten() for name, value in checkpoint.load_weights(path).items()})


BROKEN = {  # file, what happens to it, what is said
    "missing": ("campplus.onnx", Path.unlink, "missing"),
    "pointer": (
        "llm.pt",
        lambda path: path.write_bytes(POINTER),
        "a Git LFS pointer, not the file itself (fix: git -C",
    ),
    "empty": ("flow.pt", lambda path: path.write_bytes(b""), "empty (0 bytes)"),
    "cut zip": ("llm.pt", cut, "cut off: "),
    "cut at the end": ("hift.pt", lambda path: cut(path, 0.999), "cut off: "),
    "html": ("flow.pt", lambda path: path.write_text("<html>404</html>"), "not a weights file"),
    "cut onnx": ("speech_tokenizer_v2.onnx", cut, "cut off: "),
    "onnx cut at the end": ("campplus.onnx", lambda path: cut(path, 0.99999), "cut off: "),
    "html for onnx": ("campplus.onnx", lambda path: path.write_text("<html>404</html>"), "not an ONNX model"),
    "cut safetensors": ("CosyVoice-BlankEN/model.safetensors", cut, "cut off or not safetensors"),
    "cut json": ("CosyVoice-BlankEN/vocab.json", cut, "cut off or not json"),
    "cut merges": ("CosyVoice-BlankEN/merges.txt", cut, "cut off: "),
    "bad yaml": ("cosyvoice2.yaml", lambda path: path.write_text("a: [1,\nb: 2\n"), "not valid yaml"),
    "other yaml": (
        "cosyvoice2.yaml",
        lambda path: path.write_text(path.read_text().replace("mix_ratio: [5, 15]", "mix_ratio: [5, 10]")),
        "llm.mix_ratio is [5, 15] in the conf, but llm.mix_ratio is [5, 10]",
    ),
    "foreign pickle": ("llm.pt", foreign, "refused, it holds more than tensors"),
    "foreign speakers": ("spk2info.pt", foreign, "refused, it holds more than tensors"),
    "training state": (
        "flow.pt",
        lambda path: torch.save({"model": {}, "step": 3}, path),
        "not a flat dict of tensors",
    ),
    "other name": (
        "llm.pt",
        lambda path: rename_key(path, "llm_decoder", "decoder"),
        "does not fit a cosyvoice2 llm: Error(s) in loading state_dict",
    ),
    "wrong shape": ("llm.pt", transposed, "llm_decoder.weight: copying a param with shape"),
    "wrong shape of flow": ("flow.pt", transposed, "does not fit a cosyvoice2 flow"),
    "wrong rank": ("hift.pt", of_other_rank, "vocoder weights: found"),
    "wrong rank of flow": ("flow.pt", of_other_rank, "does not fit a cosyvoice2 flow"),
}


@pytest.mark.parametrize(("name", "harm", "says"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(tool, base, root, name, harm, says):
    harm(base / name)
    said, error = tool("check_model_dir", base)
    found = states(said)
    assert found[name].startswith(says) or says in found[name], found[name]
    assert f"{name}: " in error and "stage -1" in error and "1 of 1" in error, error
    bad = {file for file, state in found.items() if not state.endswith(("whole", "they fit", "agrees with the conf"))}
    assert bad == {name} and not (root / "unpickled").exists()


def test_several_are_counted(tool, base):
    for name in ("llm.pt", "hift.pt", "CosyVoice-BlankEN/config.json"):
        (base / name).write_bytes(POINTER)
    said, error = tool("check_model_dir", base)
    assert "3 of 12 files cannot be used: llm.pt: a Git LFS pointer" in error
    assert "the others: hift.pt CosyVoice-BlankEN/config.json" in error


def test_which_release(tool, base):
    assert "no such directory; fetch the model: bash run.sh" in tool("check_model_dir", base / "nothing")[1]
    (base / "speech_tokenizer_v2.onnx").rename(base / "speech_tokenizer_v3.onnx")
    assert "files of two models are mixed" in tool("check_model_dir", base)[1]
    (base / "cosyvoice2.yaml").rename(base / "cosyvoice3.yaml")
    for _ in range(2):  # by its yaml, then by its speech tokenizer
        assert "CosyVoice3 is recognised, not yet supported by this recipe" in tool("check_model_dir", base)[1]
        (base / "cosyvoice3.yaml").unlink(missing_ok=True)
    shutil.rmtree(base)
    base.mkdir()
    assert "11 of 11 files cannot be used: cosyvoice2.yaml: missing" in tool("check_model_dir", base)[1]


def test_an_onnx_whose_lengths_are_nonsense(tmp_path):
    for content in (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x3a" + b"\xff" * 40, b"\x08"):
        (tmp_path / "x.onnx").write_bytes(content)
        assert model_dir.problem(tmp_path / "x.onnx")


class Hub:
    """Stands for a hub's package: serves a folder, keeps notes beside the files, and breaks off when it is told to."""

    def __init__(self, folder, breaks=()):
        self.folder, self.breaks, self.calls = folder, list(breaks), []

    def snapshot_download(self, hub_id, *, local_dir, allow_patterns):
        local_dir = Path(local_dir)
        self.calls.append((hub_id, sorted(path.name for path in local_dir.rglob("*.pt"))))
        (local_dir / ".cache").mkdir(exist_ok=True)
        for name in filter(lambda name: (self.folder / name).is_file(), allow_patterns):
            if self.breaks and name == self.breaks[0]:
                (local_dir / ".cache" / "half.incomplete").write_bytes(b"half")
                self.breaks.pop(0)
                raise ConnectionError("the line is cut")
            (local_dir / name).parent.mkdir(exist_ok=True)
            shutil.copy(self.folder / name, local_dir / name)


@pytest.mark.parametrize(
    ("source", "package", "hub_id"),
    [
        ("huggingface", "huggingface_hub", "FunAudioLLM/CosyVoice2-0.5B"),
        ("modelscope", "modelscope", "iic/CosyVoice2-0.5B"),
    ],
)
def test_fetching_goes_on_after_a_broken_line(tool, base, tmp_path, monkeypatch, source, package, hub_id):
    """Nothing is there until everything is; extra files of the hub stay there."""
    (base / "flow.encoder.fp16.zip").write_bytes(b"not needed")
    (base / "README.md").write_text("wanted")
    hub = Hub(base, breaks=["flow.pt"])
    monkeypatch.setitem(sys.modules, package, hub)
    out, part = tmp_path / "models/base", tmp_path / "models/.base.part"
    words = ["--pretrained_dir", out, "--pretrained_source", source]
    said, error = tool("fetch_model", *words)
    assert f"{hub_id} cannot be fetched from {source} (ConnectionError: the line is cut)" in error
    assert f"run it again to go on from {part}" in error and not out.exists()
    assert (part / ".cache/half.incomplete").exists()
    said, error = tool("fetch_model", *words)
    assert not error and f"wrote {out}: 13 files" in said
    assert hub.calls == [(hub_id, []), (hub_id, ["llm.pt"])]
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {*model_dir.needed(), "CosyVoice-BlankEN/generation_config.json", "README.md"} and not part.exists()
    assert tool("fetch_model", *words)[0] == f"{out} is there\n" and len(hub.calls) == 2
    tool(
        "fetch_model", "--pretrained_dir", tmp_path / "other", "--pretrained_source", source, "--pretrained_id", "me/it"
    )
    assert hub.calls[-1][0] == "me/it"


def test_a_hub_that_hands_out_half(tool, base, tmp_path, monkeypatch):
    """Offline, huggingface_hub returns what an earlier download left, without an error."""
    (base / "hift.pt").unlink()
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(base))
    words = ["--pretrained_dir", tmp_path / "x", "--pretrained_source", "huggingface"]
    error = tool("fetch_model", *words)[1]
    assert "hift.pt: missing" in error and "run it again; if this stays, delete" in error
    assert not (tmp_path / "x").exists() and (tmp_path / ".x.part/.cache").exists()


def test_a_hub_package_that_is_not_installed(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    error = tool("fetch_model", "--pretrained_dir", tmp_path / "x", "--pretrained_source", "modelscope")[1]
    assert "needs the package modelscope" in error and error.endswith(f"{sys.executable} -m pip install modelscope")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [("HF_HUB_OFFLINE", "1", "OfflineModeIsEnabled"), ("HF_ENDPOINT", "http://127.0.0.1:9", "Connection refused")],
)
def test_no_network(run_tool, tmp_path, variable, value, says):
    """The real package, which finds nobody."""
    words = ["--pretrained_dir", tmp_path / "x", "--pretrained_source", "huggingface"]
    done = run_tool("tools/fetch_model.py", *words, status=1, env={variable: value})
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "cannot be fetched from huggingface" in lines[0] and says in lines[0], done.stderr
    assert "--pretrained_source modelscope or a FOLDER" in lines[0] and not (tmp_path / "x").exists()


def test_a_folder_as_source(tool, base, tmp_path):
    (base / "flow.encoder.fp16.zip").write_bytes(b"not needed")
    out = tmp_path / "pretrained/x"
    words = ["--pretrained_dir", out, "--pretrained_source"]
    assert f"wrote {out}: 12 files" in tool("fetch_model", *words, base)[0]
    assert (out / "llm.pt").samefile(base / "llm.pt") and not (out / "flow.encoder.fp16.zip").exists()
    shutil.rmtree(out)
    cut(base / "flow.pt")
    error = tool("fetch_model", *words, base)[1]
    assert f"{base}: flow.pt: cut off" in error and "complete that folder" in error and not out.exists()
    (base / "cosyvoice2.yaml").rename(base / "cosyvoice3.yaml")
    assert "files of two models" in tool("fetch_model", *words, base)[1]
    (base / "speech_tokenizer_v2.onnx").unlink()
    assert "holds CosyVoice3, the conf says cosyvoice2" in tool("fetch_model", *words, base)[1]
    assert "'hugging' is no folder and none of local, tiny, hugg" in tool("fetch_model", *words, "hugging")[1]
    assert "make it: python local/make_tiny_base.py" in tool("fetch_model", *words, "tiny")[1]
    assert "fetch it: --pretrained_source huggingface or modelscope" in tool("fetch_model", *words, "local")[1]


def test_stage_minus_1(run_tool, base, tmp_path):
    """Fetched from a folder, then checked; checked again before a stage that reads it."""
    words = ["bash", "run.sh", "--conf", "conf/paimon.yaml", "--pretrained_dir", tmp_path / "x", "--stage", -1]
    done = run_tool(*words, "--stop_stage", -1, f"--pretrained_source={base}")
    assert f"wrote {tmp_path / 'x'}" in done.stdout and "12 files, 17.4 MB: complete" in done.stdout
    (tmp_path / "x/llm.pt").unlink()
    done = run_tool(*words[:-1], 1, "--stop_stage", 1, status=1)
    assert "stage 1:" not in done.stdout and "llm.pt: missing" in done.stderr


def test_hub_stand_in_has_the_real_signature():
    """What fetch_model passes is what the installed package takes."""
    hub = pytest.importorskip("huggingface_hub")
    inspect.signature(hub.snapshot_download).bind("id", local_dir="x", allow_patterns=["y"])
