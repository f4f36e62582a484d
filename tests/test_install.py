"""tools/install.sh, tools/check_env.py, path.sh, importing the package. Here pip installs tiny wheels, offline."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BASE_PYTHON = Path(sys.base_prefix) / "bin" / "python3"  # not of an active environment, so that .venv gets made
PINS = ["torch==1.0", "onnxruntime==1.0", "openai-whisper==1.0  # needs a triton that no index here has", "extra==1.0"]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def ranges() -> list[Requirement]:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def make_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


def make_script(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def copy_recipe(folder: Path, pins: list[str]) -> Path:
    """The files that installing needs, in a new folder, with a stub of nvidia-smi that shows no card."""
    (folder / "tools").mkdir(parents=True)
    for name in ("tools/install.sh", "tools/check_env.py", "path.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "requirements.txt").write_text("\n".join(["# the tested set", *pins, ""]))
    make_script(folder / "bin" / "nvidia-smi", "exit 9")
    return folder


def environment(recipe: Path, **settings: str) -> dict[str, str]:
    """A shell in which no environment is active and pip reaches no index."""
    ours = ("PIP_", "VIRTUAL_ENV", "CONDA_", "PYTHON", "TORCH", "EXTRA")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    path = f"{recipe / 'bin'}:{os.environ['PATH']}"
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    return clean | offline | {"PATH": path, "PYTHON": str(BASE_PYTHON)} | settings


def start(recipe: Path, **settings: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "tools/install.sh"],
        cwd=recipe,
        env=environment(recipe, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def install(recipe: Path, status: int = 0, **settings: str) -> str:
    """Run install.sh; return what it said, on stderr when it was to fail."""
    process = start(recipe, **settings)
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, out + err
    return err if status else out


def installed(recipe: Path, name: str) -> list[str]:
    return [path.name for path in recipe.glob(f".venv/lib/python*/site-packages/{name}-*.dist-info")]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("torch", "onnxruntime", "onnxruntime_gpu", "extra"):
        make_wheel(folder, name, "1.0")
    make_wheel(folder, "torch", "1.0+cpu")
    make_wheel(folder, "torch", "0.9")
    make_wheel(folder, "openai_whisper", "1.0", requires="Requires-Dist: triton>=2\n")
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, wheels: str) -> Path:
    """A recipe in a folder with a blank and Chinese in its name, installed by two install.sh at once."""
    pytest.importorskip("ensurepip", reason="this Python cannot make environments with pip")
    folder = copy_recipe(tmp_path_factory.mktemp("clone") / "语音 recipe", PINS)
    said = [process.communicate(timeout=100) for process in [start(folder, PIP_FIND_LINKS=wheels) for _ in range(2)]]
    both = "".join(out + err for out, err in said)
    assert both.count(".venv is ready") == 1, both
    assert both.count("waiting for another") == both.count("is up to date") == 1, both
    assert re.search(r"installing 4 packages into .venv: torch for CPU, [0-9.]+ GB to download, \d+ GB on disk\n", both)
    return folder


# What is required


def test_requirements_are_exact_pins_within_the_ranges():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    texts = [text for text in (line.partition("#")[0].strip() for line in lines) if text]
    newest = r'(; python_version < "3\.\d+")?'  # where a package has no wheel yet for the newest Python
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*" + newest, text) for text in texts)
    pins = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in map(Requirement, texts)}
    assert len(pins) == len(texts)
    assert "triton" not in pins
    for requirement in ranges():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


# The Python that is there


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["echo Python 3.9.18"], "python3 is Python 3.9.18, not Python 3.11 or later"),
        (['case "$2" in *ensurepip*) exit 1 ;; esac', f'exec "{BASE_PYTHON}" "$@"'], "python3 is without venv"),
    ],
)
def test_unsuitable_python_gets_one_line_with_the_remedy(tmp_path: Path, answers: list[str], expected: str):
    recipe = copy_recipe(tmp_path / "recipe", PINS)
    make_script(recipe / "bin" / "python3", *answers)
    said = install(recipe, status=1, PYTHON="")
    assert said.count("\n") == 1 and expected in said and "PYTHON=/path/to/python3" in said
    assert not (recipe / ".venv").exists()


def test_absent_python_gets_one_line_with_the_remedy(tmp_path: Path):
    said = install(copy_recipe(tmp_path / "recipe", PINS), status=1, PYTHON="python3.99")
    assert said.count("\n") == 1 and "there is no python3.99" in said and "PYTHON=/path/to/python3" in said


# An active environment


@pytest.fixture
def active(tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """A recipe, the packages of an environment with the lowest versions allowed, a shell in which it is active."""
    recipe, active = copy_recipe(tmp_path / "recipe", PINS), tmp_path / "active"
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", active], check=True)
    packages = next(active.glob("lib/python*/site-packages"))
    shutil.copytree(Path(sys.modules["packaging"].__file__).parent, packages / "packaging")
    for requirement in ranges():
        info = packages / f"{requirement.name.replace('-', '_')}-0.dist-info"
        info.mkdir()
        lowest = str(requirement.specifier).removeprefix(">=")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {lowest}\n")
    path = f"{active / 'bin'}:{environment(recipe)['PATH']}"
    return recipe, packages, environment(recipe, PYTHON="", PATH=path, VIRTUAL_ENV=str(active), EXTRA="test")


def test_active_environment_that_satisfies_is_used_as_it_is(active: tuple[Path, Path, dict[str, str]]):
    recipe, packages, shell = active
    (packages / "onnxruntime-0.dist-info").rename(packages / "onnxruntime_gpu-0.dist-info")
    metadata = packages / "onnxruntime_gpu-0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: onnxruntime", "Name: onnxruntime-gpu"))
    run = "bash tools/install.sh && . ./path.sh && command -v python && python -c 'import sys; print(sys.prefix)'"
    lines = subprocess.check_output(["bash", "-euc", run], cwd=recipe, env=shell, text=True).splitlines()
    prefix = packages.parents[2]
    assert lines[0].startswith(f"environment: {prefix} (active, Python 3.") and "satisfies" in lines[0]
    assert lines[1:] == [f"{prefix}/bin/python", str(prefix)]
    assert not (recipe / ".venv").exists()


def test_active_environment_that_does_not_satisfy_is_left_for_venv(active: tuple[Path, Path, dict[str, str]]):
    recipe, packages, shell = active
    metadata = packages / "transformers-0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("4.51", "4.40.2"))
    shutil.rmtree(packages / "pytest-0.dist-info")
    make_script(recipe / "bin" / "df", "echo; echo disk 1 1 1000000 1% /")  # stops it before it installs
    done = subprocess.run(["bash", "tools/install.sh"], cwd=recipe, env=shell, text=True, capture_output=True)
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"environment: .venv, since {packages.parents[2]} (active, Python 3.")
    assert first.endswith(") does not satisfy pyproject.toml: transformers 4.40.2 is not >=4.51, it lacks pytest>=8")
    assert re.search(r"1 GB are free in .*, \d+ are needed", done.stderr) and done.returncode == 1
    choice = ["bash", "-euc", ". ./path.sh; command -v python"]
    chosen = subprocess.check_output(choice, cwd=recipe, env=shell, text=True)
    assert chosen == f"{recipe}/.venv/bin/python\n"


# Our own .venv, in the order of its life


def test_whisper_comes_without_triton_and_torch_for_the_cpu(recipe: Path):
    assert installed(recipe, "openai_whisper") == ["openai_whisper-1.0.dist-info"]
    assert installed(recipe, "torch") == ["torch-1.0+cpu.dist-info"]
    assert installed(recipe, "onnxruntime") and not installed(recipe, "onnxruntime_gpu")


def test_second_run_is_immediate(recipe: Path):
    begin = time.perf_counter()
    assert install(recipe).endswith("is up to date\n")  # there is no PIP_FIND_LINKS: pip could not install
    assert time.perf_counter() - begin < 2


def test_changed_requirements_and_torch_are_installed(recipe: Path, wheels: str):
    (recipe / "requirements.txt").write_text("\n".join(PINS[:3]))
    settings = {"PIP_FIND_LINKS": wheels, "TORCH": "torch==0.9 onnxruntime-gpu==1.0"}
    assert ".venv is ready" in install(recipe, **settings)
    assert installed(recipe, "torch") == ["torch-0.9.dist-info"]
    assert installed(recipe, "onnxruntime_gpu") and not installed(recipe, "onnxruntime")
    assert not installed(recipe, "extra")
    assert install(recipe).endswith("with torch==0.9 onnxruntime-gpu==1.0, is up to date\n")  # remembered


def test_killed_install_is_repaired_for_a_card_that_appeared_after_a_move(recipe: Path, wheels: str):
    """Scripts in .venv hold its folder, so a moved recipe is installed again; a card asks for onnxruntime-gpu."""
    moved = recipe.rename(recipe.with_name("moved 配方"))
    answers = 'case "$*" in *driver_version*) echo 535.104.05 ;; *) echo "GPU 0: a card" ;; esac'
    make_script(moved / "bin" / "nvidia-smi", answers)
    killed = start(moved, PIP_FIND_LINKS=wheels, TORCH="")
    for line in killed.stdout:
        if "installing" in line:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    said = install(moved, PIP_FIND_LINKS=wheels)
    assert ".venv is unfinished" in said and "with its CUDA libraries" in said
    assert "the NVIDIA driver 535.104.05 is older than 580" in said
    assert installed(moved, "torch") == ["torch-1.0.dist-info"]  # not the CPU build
    assert installed(moved, "onnxruntime_gpu") and not installed(moved, "onnxruntime")
    make_script(moved / "bin" / "nvidia-smi", "exit 9")
    assert install(moved).endswith("is up to date\n")  # a login node without cards shares the folder


def test_unreachable_index_ends_in_one_clear_line_and_a_later_run_succeeds(tmp_path: Path):
    pytest.importorskip("ensurepip", reason="this Python cannot make environments with pip")
    recipe = copy_recipe(tmp_path / "recipe", PINS)
    *pip, last = install(recipe, status=1).splitlines()
    assert any(line.startswith("ERROR: No matching distribution found for") for line in pip)
    assert last.startswith("install.sh: the package index cannot be reached; check the network")
    assert not (recipe / ".venv" / "installed").exists()


# Importing


def run_python(code: str) -> str:
    shell = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, env=shell)


def test_torchaudio_imports_where_its_library_does_not_load():
    printed = run_python(
        "import cosyvoice_ft, torch\n"
        "def load_library(path): raise OSError('libcudart.so: cannot open shared object file')\n"
        "torch.ops.load_library = load_library\n"
        "import torchaudio\n"
        "from transformers import Qwen2ForCausalLM\n"
        "print(torchaudio.transforms.Resample(24000, 16000)(torch.zeros(1, 24000)).shape[1])\n"
        "print(torchaudio.compliance.kaldi.fbank(torch.zeros(1, 16000), num_mel_bins=80).shape[1])\n"
        "try: torchaudio.functional.forced_align(torch.zeros(1, 2, 3), torch.ones(1, 1))\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert printed == "16000\n80\ntorchaudio's forced_align needs its native library, which does not load here\n"


def test_other_errors_of_torchaudio_are_not_hidden():
    printed = run_python(
        "import cosyvoice_ft, torch\n"
        "def load_library(path): raise ZeroDivisionError\n"
        "torch.ops.load_library = load_library\n"
        "try: import torchaudio\n"
        "except ZeroDivisionError: print('seen')\n"
    )
    assert printed == "seen\n"


def test_importing_the_package_is_cheap():
    code = (
        "import sys, time; begin = time.perf_counter(); import cosyvoice_ft\n"
        "print(time.perf_counter() - begin); assert not {'torch', 'torchaudio', 'numpy'} & set(sys.modules)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.020  # seconds
