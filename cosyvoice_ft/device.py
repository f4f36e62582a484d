"""Where heavy work runs, said aloud; a card that cannot be used is an error and never a silent fall back to the CPU."""

import os
import re
import shutil
import subprocess

import torch

from cosyvoice_ft.files import BadInput


def nvidia_cards() -> list[str]:
    """Names of the NVIDIA cards that the driver shows and CUDA_VISIBLE_DEVICES does not hide; works without CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(command, text=True, capture_output=True)
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []


def torch_device(name: str) -> torch.device:
    """Return the device of `name` ("auto", "cpu", "cuda", "cuda:1").

    Raises BadInput for another name, and when a card is there (or asked for) and this torch cannot use it.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise BadInput(f"device: '{name}' is unknown; one of: auto, cpu, cuda, cuda:1")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() or nvidia_cards() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        cards = nvidia_cards()
        if not cards:
            raise BadInput(
                f"device: {name}, and no NVIDIA card is seen (by nvidia-smi and CUDA_VISIBLE_DEVICES); say --device cpu"
            )
        raise BadInput(
            f"device: {', '.join(cards)} cannot be used by torch {torch.__version__} (built for "
            f"{torch.version.cuda or 'CPU only'}); install a torch for your driver: TORCH='torch==...' bash "
            "tools/install.sh, or say --device cpu"
        )
    where = torch.device(name)
    if (where.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device: {name}, and the cards are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return where


def onnx_providers(device: torch.device) -> list[str]:
    """Return onnxruntime's execution providers for `device`.

    Raises BadInput when the device is a card and onnxruntime is the CPU build.
    """
    import onnxruntime

    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BadInput(
            f"device: onnxruntime {onnxruntime.__version__} here has no CUDA provider; pip uninstall onnxruntime, pip "
            "install onnxruntime-gpu (they share one directory: one or the other), or say --device cpu"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # the CUDA libraries that came with torch
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def describe(device: torch.device, providers: list[str] | None = None) -> str:
    """Return the first line of a heavy stage: device, torch, CUDA, onnxruntime provider."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    parts = [f"device {device} ({where})", f"torch {torch.__version__}", f"CUDA {torch.version.cuda or 'none'}"]
    if providers:
        import onnxruntime

        parts.append(f"onnxruntime {onnxruntime.__version__} {providers[0]}")
    return ", ".join(parts)


def free_memory(where: torch.device) -> int:
    """Return the bytes that are free on the card; of the CPU, what the system calls available."""
    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[0]
    return _proc_bytes("/proc/meminfo", "MemAvailable")


def peak_memory(where: torch.device) -> int:
    """Return the most bytes that were in use at once so far, on the card or by this process."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return _proc_bytes("/proc/self/status", "VmHWM")  # getrusage would count what the parent had before the fork


def _proc_bytes(path: str, key: str) -> int:
    with open(path) as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts[key].split()[0]) * 1024
