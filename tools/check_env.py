"""Say whether the active environment satisfies pyproject.toml; tools/install.sh then uses it as it is.

    python3 tools/check_env.py          # what run.sh needs
    python3 tools/check_env.py test     # and the optional requirements 'test', which tests/run.sh needs

reads   pyproject.toml: dependencies, optional-dependencies
exit 0  a virtual or conda environment (not our own .venv) is active and satisfies them: says so on one line
exit 1  it does not: says on one line what is wrong; or no environment is active: says nothing
"""

import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement  # pip carries a copy
    except ImportError:
        Requirement = None

ROOT = Path(__file__).resolve().parent.parent


def is_active() -> bool:
    """Return whether this Python is that of a virtual or conda environment other than our own .venv."""
    prefix, conda = Path(sys.prefix).resolve(), os.environ.get("CONDA_PREFIX")
    if prefix == ROOT / ".venv":
        return False
    return sys.prefix != sys.base_prefix or bool(conda and prefix == Path(conda).resolve())


def fault(requirement: "Requirement") -> str | None:
    """Return what is wrong with a Requirement here, as 'torch 2.4.0 is not >=2.6'; None when it is satisfied."""
    names = ["onnxruntime", "onnxruntime-gpu"] if requirement.name == "onnxruntime" else [requirement.name]
    for name in names:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        satisfied = requirement.specifier.contains(version, prereleases=True)
        return None if satisfied else f"{name} {version} is not {requirement.specifier}"
    return f"it lacks {requirement.name}{requirement.specifier}"


def faults(groups: list[str]) -> list[str]:
    """Return what is wrong with this environment, a list of short sentences."""
    if Requirement is None:
        return ["it lacks packaging"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [text for group in groups for text in project["optional-dependencies"][group]]
    return [found for found in map(fault, map(Requirement, wanted)) if found]


def main() -> None:
    if not is_active():
        sys.exit(1)
    found = faults(sys.argv[1:])
    verdict = f"does not satisfy pyproject.toml: {', '.join(found)}" if found else "satisfies pyproject.toml"
    print(f"{sys.prefix} (active, Python {sys.version_info[0]}.{sys.version_info[1]}) {verdict}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
