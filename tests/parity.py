"""The account of a parity run: every recorded array is compared, an input, or excluded with a reason.

A recorded file is an .npz or a .json; the leaves of a json (numbers, strings, lists without objects) count as arrays,
named by their dotted path.
"""

import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


def as_array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else value)


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted path: leaf} of a json."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = f"{path}.{key}" if path else str(key)
        nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
        found |= leaves(value, name) if nested else {name: value}
    return found


@dataclass
class Recorded:
    """One recorded file."""

    name: str
    arrays: dict[str, Any]
    data: Any = None  # of a json, as it stands
    inputs: set[str] = field(default_factory=set)
    compared: dict[str, tuple[float, str]] = field(default_factory=dict)  # worst error / tolerance, tolerance
    excluded: dict[str, str] = field(default_factory=dict)

    def given(self, pattern: str) -> Any:
        """Return an input; a pattern with * marks all that match and returns them by name."""
        names = fnmatch.filter(self.arrays, pattern) if "*" in pattern else [pattern]
        self.inputs.update(names)
        return {name: self.arrays[name] for name in names} if "*" in pattern else self.arrays[pattern]

    def exclude(self, pattern: str, reason: str) -> None:
        for name in fnmatch.filter(self.arrays, pattern):
            self.excluded.setdefault(name, reason)

    def check(self, name: str, ours: Any, *, atol: float = 0.0, rtol: float = 0.0, part: Any = ...) -> None:
        """Assert that `ours` equals what was recorded (`part` of it) within the tolerance, and note by how much."""
        expected = self.arrays[name]
        if isinstance(expected, str | bool) or expected is None or (atol == rtol == 0 and isinstance(expected, list)):
            assert ours == expected, f"{self.name} {name}: {ours!r}, recorded {expected!r}"
            self.note(name, 0.0, "equal")
            return
        expected, ours = as_array(expected)[part], as_array(ours)
        assert ours.shape == expected.shape, f"{self.name} {name}: shape {ours.shape}, recorded {expected.shape}"
        np.testing.assert_allclose(ours, expected, atol=atol, rtol=rtol, err_msg=f"{self.name} {name}")
        self.note(name, worst_ratio(ours, expected, atol, rtol), tolerance_text(atol, rtol))

    def note(self, name: str, ratio: float, tolerance: str) -> None:
        before = self.compared.get(name, (0.0, ""))[0]
        self.compared[name] = (max(before, ratio), tolerance)

    def left(self) -> list[str]:
        return [name for name in self.arrays if name not in self.inputs | self.compared.keys() | self.excluded.keys()]


def worst_ratio(ours: np.ndarray, expected: np.ndarray, atol: float, rtol: float) -> float:
    """Return the largest |error| / (atol + rtol |expected|); infinities that agree count as no error."""
    if not ours.size or not np.issubdtype(expected.dtype, np.number) or atol == rtol == 0:
        return 0.0
    ours, expected = ours.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    error, bound = np.abs(ours[finite] - expected[finite]), atol + rtol * np.abs(expected[finite])
    return float((error / np.maximum(bound, 1e-300)).max(initial=0.0))


def tolerance_text(atol: float, rtol: float) -> str:
    parts = [f"atol {atol:g}"] * bool(atol) + [f"rtol {rtol:g}"] * bool(rtol)
    return " ".join(parts) or "equal"


class Page:
    """All recorded files of a run, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Recorded] = {}
        self.absent: list[str] = []
        self.left_out: dict[str, str] = {}  # whole files
        self.whole = True  # no test of test_parity.py was deselected

    def open(self, name: str) -> Recorded:
        """Return a recorded file. Raises FileNotFoundError, and lists it as absent, when the folder has none."""
        if name not in self.files:
            path = self.folder / name
            if not path.is_file():
                self.absent += [name] * (name not in self.absent)
                raise FileNotFoundError(name)
            if path.suffix == ".json":
                data = json.loads(path.read_text(encoding="utf-8"))
                self.files[name] = Recorded(name, leaves(data), data)
            else:
                with np.load(path) as file:
                    self.files[name] = Recorded(name, {key: file[key] for key in file.files})
        return self.files[name]

    def lines(self) -> list[str]:
        """Return the page."""
        lines = [f"{'file':32} {'compared':>9} {'inputs':>7} {'excluded':>9} {'in file':>8}   worst error / tolerance"]
        for name, file in sorted(self.files.items()):
            row = f"{name:32} {len(file.compared):9} {len(file.inputs - file.compared.keys()):7}"
            only_excluded = file.excluded.keys() - file.compared.keys() - file.inputs
            row += f" {len(only_excluded):9} {len(file.arrays):8}"
            worst: dict[str, tuple[float, str]] = {}
            for array, (ratio, tolerance) in file.compared.items():
                if ratio >= worst.get(tolerance, (-1.0, ""))[0]:
                    worst[tolerance] = (ratio, array)
            said = [f"{ratio:.2g} of {tolerance} ({array})" for tolerance, (ratio, array) in worst.items() if ratio]
            lines.append(f"{row}   {'; '.join(said) or 'all equal'}")
            left = file.left()
            lines += [f"    not accounted for: {array}" for array in left[:10]]
            lines += [f"    not accounted for: {len(left) - 10} more"] * (len(left) > 10)
            reasons: dict[str, int] = {}
            for array in only_excluded:
                reasons[file.excluded[array]] = reasons.get(file.excluded[array], 0) + 1
            lines += [f"    excluded {count}: {reason}" for reason, count in reasons.items()]
        for reason in sorted(set(self.left_out.values())):
            names = sorted(name for name, why in self.left_out.items() if why == reason)
            lines.append(f"not compared, {reason}: {' '.join(names)}")
        return lines + [f"{name:32} ABSENT in {self.folder}" for name in sorted(self.absent)]
