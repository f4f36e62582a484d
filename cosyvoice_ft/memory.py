"""What a training will need, said before its first step: measured on a few utterances, then scaled to a full batch."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cosyvoice_ft import device
from cosyvoice_ft.engine import Engine

# Multiply-adds of dense bf16 matrices, in 10^12 operations a second, from the makers' data sheets.
PEAK = {"H200": 989, "H100": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125}
PEAK |= {"RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "RTX 3080": 60, "RTX 6000 Ada": 364, "RTX A6000": 155}


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def forward_cost(engine: Engine, batch: dict) -> tuple[int, int]:
    """Run `batch` forward; return the bytes kept for the backward pass, weights not among them, and the operations."""
    own = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine.module.train()
    counter, inputs = FlopCounterMode(display=False), engine.to_device(batch)
    keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keep, counter, engine.autocast():
        out = engine.module(**inputs)  # `out` holds the graph, and so every tensor in `kept`, until here
    del out
    return sum(kept.values()), counter.get_total_flops()


def report(engine: Engine, small: dict, larger: dict, max_batch: int, optimizer: str) -> tuple[str, float | None]:
    """Return a line (what is there, what a full batch adds, what is free) and positions a second at the card's peak.

    small and larger are batches of different size: their difference leaves out what does not grow with a batch, such
    as the copies of the weights in the dtype of autocast. The second is None where the peak is not known.
    """
    parameters = list(engine.module.parameters())
    weights, grads = bytes_of(parameters), bytes_of(p for p in parameters if p.requires_grad)
    states = grads // 2 if optimizer == "adamw8bit" else 2 * grads  # two moments
    (bytes_small, work_small), (bytes_larger, work_larger) = (forward_cost(engine, batch) for batch in (small, larger))
    more = max(larger["padded"] - small["padded"], 1)
    activations = max(bytes_small + (bytes_larger - bytes_small) / more * (max_batch - small["padded"]), 0)
    need, free = grads + states + activations, device.free_memory(engine.device)
    parts = {"weights": weights, "gradients": grads, "optimizer": states, f"activations at {max_batch}": activations}
    said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    warning = " NOT ENOUGH: lower max_batch, or set train.checkpointing or train.freeze" if need > free else ""
    line = f"memory, GB: {said}; to come {need / 1e9:.2f}, free {free / 1e9:.2f}{warning}"
    work = 3 * (work_larger - work_small) / more  # a position; backward is two forwards
    return line, peak_of(engine.device) / work if work > 0 and peak_of(engine.device) else None


def peak_of(where: torch.device) -> float | None:
    """Return the operations a second of a known card."""
    if where.type != "cuda":
        return None
    name = torch.cuda.get_device_name(where)
    found = [card for card in PEAK if card in name]
    return PEAK[max(found, key=len)] * 1e12 if found else None


def recompute(layers: list[nn.Module]) -> None:
    """Keep only the inputs of these layers for the backward pass and compute the rest again (Chen et al., 2016)."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
