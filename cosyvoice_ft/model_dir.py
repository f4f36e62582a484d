"""A model directory on disk: which files it has to hold, which model they are, and whether each has arrived whole.

    cosyvoice2.yaml   llm.pt flow.pt hift.pt   campplus.onnx speech_tokenizer_v2.onnx   CosyVoice-BlankEN/ (Qwen2)

Looks at names, sizes and headers; weights stay on disk. Whether the weights fit is for synthesis.load_model to say.
"""

import json
import os
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cosyvoice_ft import checkpoint
from cosyvoice_ft.conf import read_yaml
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.text import TOKENIZER_DIR, TOKENIZER_FILES

WEIGHTS = ("llm.pt", "flow.pt", "hift.pt")
TOKENIZERS = {"cosyvoice2": "speech_tokenizer_v2.onnx", "cosyvoice3": "speech_tokenizer_v3.onnx"}
OPTIONAL = ("spk2info.pt", f"{TOKENIZER_DIR}/generation_config.json", "README.md", "LICENSE")
RELEASES = {"cosyvoice": "CosyVoice 1", "cosyvoice2": "CosyVoice2", "cosyvoice3": "CosyVoice3"}  # official order
BYTES = 256  # pieces of a byte-level vocabulary that no merge makes
GRAPH, OPSET_IMPORT = 7, 8  # fields of ONNX's ModelProto; writers put them last, in this order


def needed(model: str = "cosyvoice2") -> tuple[str, ...]:
    """Return the files, relative to the directory, without which training, or the official code, cannot work."""
    qwen = (f"{TOKENIZER_DIR}/{name}" for name in ("config.json", *TOKENIZER_FILES, "model.safetensors"))
    return (f"{model}.yaml", *WEIGHTS, "campplus.onnx", TOKENIZERS[model], *qwen)


def release(folder: Path) -> str:
    """Return which model a directory holds, a key of RELEASES: its yaml says so, else its speech tokenizer.

    A directory that says nothing counts as CosyVoice2, whose files are then missing. Raises BadInput for a mixture.
    """
    tokenizers = [model for model, name in TOKENIZERS.items() if (folder / name).exists()]
    model = next((name for name in RELEASES if (folder / f"{name}.yaml").exists()), None)
    if model in TOKENIZERS and tokenizers and model not in tokenizers:
        found = TOKENIZERS[tokenizers[0]]
        raise BadInput(f"{folder}: {model}.yaml beside {found}: files of two models are mixed; fetch one of them anew")
    return model or (tokenizers[0] if tokenizers else "cosyvoice2")


def problem(path: Path) -> str:
    """Return why a file of a model directory cannot be used, "" when it is whole."""
    if not path.is_file():
        return "missing"
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer, not the file itself (fix: git -C {shlex.quote(str(path.parent))} lfs pull)"
    try:
        CHECKS.get(path.suffix, lambda path: None)(path)
    except BadInput as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def check_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise BadInput(f"{path}: cut off or not json ({error})") from error


def check_merges(path: Path) -> None:
    """merges.txt has one line for every piece of vocab.json that is not a single byte."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: cut off or not UTF-8") from error
    merges = sum(bool(line) for line in lines) - lines[0].startswith("#version")
    vocabulary = path.with_name("vocab.json")
    if not problem(vocabulary) and merges < len(check_json(vocabulary)) - BYTES:
        raise BadInput(f"{path}: cut off: {merges} merges for the {len(check_json(vocabulary))} pieces of vocab.json")


def check_weights(path: Path) -> None:
    """Plain tensors in a zip file, whose directory stands at its end."""
    with open(path, "rb") as file:
        begins = file.read(4) == b"PK\3\4"
    if not begins:
        raise BadInput(f"{path}: not a weights file (torch.save writes zip files)")
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path}: cut off: {path.stat().st_size:,} bytes without the directory that ends a zip file")
    checkpoint.load(path)


def check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # compares the header with the size of the file
            pass
    except SafetensorError as error:
        raise BadInput(f"{path}: cut off or not safetensors ({error})") from error


def check_onnx(path: Path) -> None:
    """Walk the outermost fields of the protobuf message: each is a key, then a number or a length and so many bytes."""
    fields, size = set(), path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            field, wire_type = divmod(read_varint(file), 8)
            if wire_type not in (0, 2):
                raise BadInput(f"{path}: not an ONNX model")
            number = read_varint(file)
            fields.add(field)
            if wire_type == 2:
                file.seek(min(file.tell() + number, size + 1))
        if file.tell() > size or not {GRAPH, OPSET_IMPORT} <= fields:
            raise BadInput(f"{path}: cut off: {size:,} bytes hold no complete ONNX model")


def read_varint(file: BinaryIO) -> int:
    """Read a protobuf integer: seven bits a byte, the lowest first, the top bit set on all bytes but the last."""
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80 or shift > 63:
            break
        shift += 7
    return value


CHECKS: dict[str, Callable[[Path], object]] = {
    ".json": check_json,
    ".onnx": check_onnx,
    ".pt": check_weights,
    ".safetensors": check_safetensors,
    ".txt": check_merges,
    ".yaml": read_yaml,
}


def link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system cannot link; the target stays when the source is deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
