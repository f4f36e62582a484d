"""What all tests share: where recorded numbers and real recordings lie, and the record of what was compared."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import Page

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tests" / "assets"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens", type=Path, default=ASSETS, help="folder of recorded inputs and outputs of the reference"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.parity_page, config.parity_lines = Page(config.getoption("--goldens")), []


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_parity.py":
            item.config.parity_page.whole = False


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Take the page from the process that compared."""
    node.config.parity_lines += getattr(node, "workeroutput", {}).get("parity", [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    page = session.config.parity_page
    if page.files or page.absent:
        session.config.parity_lines += page.lines()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = session.config.parity_lines


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.parity_lines:
        terminalreporter.section("recorded numbers of the reference")
        for line in config.parity_lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Path:
    """Folder with the numbers recorded from the reference implementation."""
    return request.config.getoption("--goldens")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_base(run_tool, tmp_path_factory) -> Path:
    """A complete model directory with small random weights."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny-cosyvoice2"
    run_tool("local/make_tiny_base.py", folder)
    return folder


@pytest.fixture(scope="session")
def speech_dir() -> Path:
    """Folder of real recordings, named by SPEECH_DIR; the tests that need it say that they skip without it."""
    folder = os.environ.get("SPEECH_DIR")
    if not folder:
        pytest.skip("SPEECH_DIR is not set: tests on real recordings need a folder with ljspeech-200/")
    return Path(folder)


def as_array(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


@pytest.fixture(scope="session")
def compare() -> Callable[..., None]:
    """compare(file, array, ours, expected, *, atol, rtol): shapes equal, values within tolerance (both 0: equal)."""

    def check(file: str, array: str, ours, expected, *, atol: float = 0.0, rtol: float = 0.0) -> None:
        ours, expected = as_array(ours), as_array(expected)
        assert ours.shape == expected.shape, f"{file} {array}: shape {ours.shape}, recorded {expected.shape}"
        np.testing.assert_allclose(ours, expected, atol=atol, rtol=rtol, err_msg=f"{file} {array}")

    return check


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess]:
    """run_tool("tools/x.py", args...): the finished process with its text output, from the root of the project."""

    def run(*command, status: int | None = 0, **kwargs) -> subprocess.CompletedProcess:
        command = [str(part) for part in command]
        if command[0].endswith(".py"):
            command.insert(0, sys.executable)
        env = os.environ | {"PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
        done = subprocess.run(command, cwd=kwargs.pop("cwd", ROOT), text=True, capture_output=True, env=env, **kwargs)
        if status is not None:
            assert done.returncode == status, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def clone(root, tmp_path_factory):
    """A copy of the project in a folder with a blank and Chinese in its name; the running environment serves it."""
    target = tmp_path_factory.mktemp("clone") / "派蒙 recipe"
    ignored = shutil.ignore_patterns(".git", ".venv*", "data", "exp", "pretrained_models", "__pycache__", ".*_cache")
    shutil.copytree(root, target, ignore=ignored)
    return target


@pytest.fixture(scope="session")
def run(clone):
    """run(words, status=0): `bash run.sh words` in the copy, ended with that status."""

    def call(*words, status=0):
        done = subprocess.run(["bash", "run.sh", *map(str, words)], cwd=clone, text=True, capture_output=True)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return call
