"""What a training will need, said before its first step: measured on one small batch, then scaled to a full one."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosyvoice_ft.engine import Engine


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def activation_bytes(engine: Engine, batch: dict) -> int:
    """Return the bytes that the forward pass of `batch` keeps for its backward pass, parameters not among them."""
    own = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine.module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.forward(batch)
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device; of the CPU, what the system calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":") for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024


def report(engine: Engine, batch: dict, max_batch: int) -> str:
    """Return the estimate as a line: what is there already, what a full batch adds, and what is free."""
    parameters = list(engine.module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights, grads = bytes_of(parameters), bytes_of(trained)
    states = 2 * grads  # two moments
    activations = activation_bytes(engine, batch) * max_batch / batch["padded"]
    need, free = grads + states + activations, free_bytes(engine.device)
    parts = {"weights": weights, "gradients": grads, "optimizer": states, f"activations at {max_batch}": activations}
    said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    warning = " NOT ENOUGH: lower max_batch, or set train.checkpointing or train.freeze" if need > free else ""
    return f"memory, GB: {said}; to come {need / 1e9:.2f}, free {free / 1e9:.2f}{warning}"


def recompute(layers: list[nn.Module]) -> None:
    """Keep only the inputs of these layers for the backward pass and compute the rest again (Chen et al., 2016)."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
