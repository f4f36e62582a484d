"""The house: imports flow downhill, importing does nothing, nothing of one machine is in the repository."""

import ast
import re
import subprocess
import sys

FLOORS = {
    "files": set(),
    "models": {"files"},
    "table": {"files"},
    "audio": {"files"},
    "text": {"files"},
    "shards": {"files"},
    "schedules": {"files"},
    "cli": {"files"},
    "conf": {"files"},
    "device": {"files"},
    "jobs": {"files", "cli"},
    "layout": {"files", "table"},
    "extractors": {"files", "audio"},
    "extraction": {"files", "cli", "table", "jobs", "extractors"},
    "packing": {"files", "cli", "table", "audio", "text", "shards", "jobs", "extractors", "extraction"},
    "model_dir": {"files", "conf", "checkpoint", "text"},
    "data_dir": {"files", "audio", "table"},
    "levels": set(),
    "corpus": {"files", "audio", "table", "jobs", "levels"},
    "dataset": {"files", "shards"},
    "metrics": {"audio", "levels"},
    "voices": {"files", "audio", "levels"},
    "recognise": {"files", "audio", "table", "text", "jobs", "corpus", "metrics"},
    "scoring": {
        "files",
        "audio",
        "table",
        "text",
        "device",
        "jobs",
        "corpus",
        "extractors",
        "metrics",
        "voices",
        "recognise",
    },
    "summary": set(),
    "texts": {"files"},
    "ranks": {"files"},
    "memory": {"device", "engine"},
    "training": {"files", "checkpoint", "device", "engine"},
    "listening": {"audio", "checkpoint", "engine", "shards", "synthesis", "table", "texts"},
    "checkpoint": {"files", "conf"},
    "engine": {"files", "checkpoint", "ranks"},
    "synthesis": {"files", "models", "audio", "text", "conf", "checkpoint"},
}


def imported(path):
    """Names of the project's modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cosyvoice_ft":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: relative import"
    return names


def test_imports_flow_downhill(root):
    for path in (root / "cosyvoice_ft").rglob("*.py"):
        if path.name == "__init__.py":
            continue
        module = path.relative_to(root / "cosyvoice_ft").parts[0].removesuffix(".py")
        upward = imported(path) - FLOORS[module] - {module}
        assert not upward, f"{path.name} imports {upward}"
    for path in (root / "local").glob("*.py"):
        assert not imported(path) & {"engine", "dataset", "synthesis"}, path


def test_importing_does_nothing(root):
    """No session, seed, thread pool or heavy library comes with the light modules."""
    light = ["files", "table", "cli", "conf", "jobs", "text", "corpus", "schedules"]
    code = f"import sys; import torch; before = set(sys.modules); from cosyvoice_ft import {', '.join(light)}\n"
    code += (
        "heavy = {'transformers', 'onnxruntime', 'whisper', 'deepspeed', 'wetext', 'matplotlib'} & set(sys.modules)\n"
    )
    code += "assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_no_machine_and_no_registry_in_the_repository(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, text=True, capture_output=True)
    if listed.returncode:  # an unpacked archive
        paths = [p for p in root.rglob("*") if p.suffix in (".py", ".sh", ".yaml", ".md", ".toml", ".txt")]
        paths = [p for p in paths if not {".venv", "data", "exp", "pretrained_models"} & set(p.relative_to(root).parts)]
    else:
        paths = [root / name for name in listed.stdout.splitlines()]
    parts = [("/ro", "ot/"), ("/wo", "rk/"), ("/ho", "me/[a-z]"), ("py", r"pi\.org"), ("python", "hosted")]
    banned = re.compile("|".join(a + b for a, b in parts))  # put together here, so that this file passes
    for path in paths:
        if path.suffix in (".py", ".sh", ".yaml", ".md", ".toml", ".txt", "") and path.is_file():
            found = banned.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path}: {found[0]}"
        assert path.stat().st_size < 5e6, f"{path} is larger than 5 MB"
