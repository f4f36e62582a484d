"""How one update is computed: two engines with the same methods, so that the training loop knows neither.

    forward(batch, last)     losses of a batch under autocast; `last` is the last batch of an update
    backward(loss, last)     gradients of a loss that is divided already by all positions of the update
    update(lr)               clip, step, clear -> the gradient's norm; a gradient that is not finite changes nothing
    clear()                  forget the gradients of an update that failed
    weights()                the full float32 weights (call it on every rank)
    save(path, facts)        what resuming needs (every rank); load(path) takes it back

A batch is a dict of tensors. `total` and `rank`, `world_size` serve the loop. Weights, gradients and losses are float32
always; `train.dtype` is that of autocast, in which matrices are multiplied.
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosyvoice_ft import checkpoint
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.ranks import world

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of `train.dtype`; None is float32 throughout. auto: bf16 on a card that has it."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        name = "bf16" if fast else "fp32"
    if name not in DTYPES:
        raise BadInput(f"train.dtype: '{name}' is unknown; one of: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Take the parameters whose names match one of the patterns (regular expressions) out of training.

    Returns how many numbers are frozen. Raises BadInput for a pattern that matches nothing, or when all is frozen.
    """
    frozen = 0
    for pattern in patterns:
        hit = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not hit:
            some = ", ".join(list(dict(model.named_parameters()))[:3])
            raise BadInput(f"train.freeze: '{pattern}' matches no parameter; names are like {some}")
        for p in hit:
            frozen += p.numel() * p.requires_grad
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(f"train.freeze: {list(patterns)} freezes everything; nothing is left to train")
    return frozen


def make_optimizer(model: nn.Module, settings: Mapping) -> torch.optim.Optimizer:
    """Return the optimizer of `train.optimizer` over what is trained; vectors (biases, norms) take no weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    options = {"lr": settings["lr"], "betas": tuple(settings["betas"])}
    if settings["optimizer"] == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if settings["optimizer"] == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise BadInput(
                "train.optimizer: adamw8bit needs bitsandbytes; pip install bitsandbytes, or adamw"
            ) from error
        return AdamW8bit(groups, **options)
    raise BadInput(f"train.optimizer: '{settings['optimizer']}' is unknown; one of: adamw, adamw8bit")


class Engine:
    """What both engines share: where they run, and sums over ranks."""

    saves_parts = False  # last.pt holds all of it, for any number of processes

    def __init__(self, model: nn.Module, settings: Mapping, device: torch.device) -> None:
        self.rank, self.world_size = world()
        self.device, self.module = device, model.to(device)
        self.dtype = autocast_dtype(settings["dtype"], device)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def to_device(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        return {key: value.to(self.device, non_blocking=True) for key, value in tensors.items()}

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch without gradients, in the precision of training."""
        with self.autocast():
            return self.module(**self.to_device(batch))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` (on any device) over all ranks."""
        if self.world_size > 1:
            there = values.to(self.device)
            dist.all_reduce(there)
            return there.to(values.device)
        return values

    def anywhere(self, here: bool) -> bool:
        """Return whether it is so on any rank; the device is waited for."""
        return here if self.world_size == 1 else bool(self.total(torch.full((), float(here), device=self.device)) > 0)


class TorchEngine(Engine):
    """One process, or one rank of several under torchrun.

    DistributedDataParallel exchanges gradients while they are computed. With auto_batch they are exchanged afterwards:
    a rank that runs out of memory would leave the others waiting in the middle.
    """

    def __init__(self, model: nn.Module, settings: Mapping, device: torch.device) -> None:
        super().__init__(model, settings, device)
        if self.dtype == torch.float16:
            raise BadInput("train.dtype: fp16 needs loss scaling; take bf16, or train.engine deepspeed")
        self.clip = settings["grad_clip"]
        self.optimizer = make_optimizer(model, settings)
        self.model = model
        self.exchange_late = self.world_size > 1 and settings["auto_batch"]
        if self.world_size > 1 and not self.exchange_late:
            devices = [device] if device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        if settings["compile"]:
            self.model = torch.compile(self.model, dynamic=True)

    def forward(self, batch: Mapping[str, Any], *, last: bool = True) -> dict[str, Tensor]:
        with self.quiet(last), self.autocast():
            return self.model(**self.to_device(batch))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        with self.quiet(last):
            loss.backward()

    def quiet(self, last: bool) -> contextlib.AbstractContextManager:
        """Only the last batch of an update exchanges gradients with the other ranks."""
        alone = last or self.world_size == 1 or self.exchange_late
        return contextlib.nullcontext() if alone else self.model.no_sync()

    def update(self, lr: float) -> Tensor:
        if self.exchange_late:
            for p in self.module.parameters():
                if p.requires_grad:
                    dist.all_reduce(p.grad)
                    p.grad /= self.world_size
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        bad = (~torch.isfinite(norm)).float()
        if self.optimizer.defaults.get("fused"):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad  # skipped on the device, without a stall
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.clear()
        return norm

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def save(self, path: Path, facts: Mapping) -> None:
        if self.rank == 0:
            state = {"model": self.weights(), "optimizer": self.optimizer.state_dict(), "facts": dict(facts)}
            checkpoint.save(path, state)

    def load(self, path: Path) -> None:
        state = checkpoint.load(path)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """ZeRO 1 or 2 of DeepSpeed, set up from a json (conf/ds_stage2.json); all that the conf names is the conf's.

    DeepSpeed sees float32 weights and our autocast inside the model, so that what is computed and saved is what the
    other engine computes and saves. fp16 needs its loss scaled: the scale falls after a gradient that is not finite and
    rises slowly again.
    """

    saves_parts = True
    OURS = ("optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps", "bf16", "fp16", "amp")
    OURS += ("train_batch_size", "train_micro_batch_size_per_gpu", "torch_autocast", "prescale_gradients")
    SCALE, FALL, RISE, RISE_AFTER, MOST = 2.0**12, 16.0, 2.0, 1000, 2.0**16

    def __init__(self, model: nn.Module, settings: Mapping, device: torch.device) -> None:
        super().__init__(model, settings, device)
        if settings["auto_batch"]:
            raise BadInput("train.auto_batch: only with train.engine torch_ddp; with deepspeed lower max_batch")
        try:
            import deepspeed
        except ImportError as error:
            raise BadInput("train.engine: deepspeed is not installed; pip install deepspeed, or torch_ddp") from error
        if device.type == "cpu":  # an operator of it that would be compiled, and is not needed
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        model.forward = self.autocast()(model.forward)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=make_optimizer(model, settings),
            config=self.config(settings),
            dist_init_required=False,
        )
        self.scale, self.good = (self.SCALE if self.dtype == torch.float16 else 1.0), 0

    def config(self, settings: Mapping) -> dict:
        """Return the json with what the conf decides. Raises BadInput for a json that decides it as well."""
        path = settings["deepspeed"]
        try:
            own = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise BadInput(f"train.deepspeed: {path}: {error}") from error
        twice = [key for key in self.OURS if key in own]
        if twice:
            raise BadInput(f"{path}: '{twice[0]}' is set by the conf (train.*), not here; delete it from the json")
        stage = own.get("zero_optimization", {}).get("stage")
        if stage not in (1, 2):
            raise BadInput(f"{path}: zero_optimization.stage is {stage}; 1 or 2 (every process keeps all weights)")
        return own | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings["grad_clip"],
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the CPU as well
        }

    def forward(self, batch: Mapping[str, Any], *, last: bool = True) -> dict[str, Tensor]:
        self.engine.set_gradient_accumulation_boundary(last)
        return self.engine(**self.to_device(batch))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self.engine.optimizer.override_loss_scale(self.scale)
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if self.dtype == torch.float16:
            self.adapt_scale(math.isfinite(norm))
        return torch.tensor(norm)

    def adapt_scale(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / self.FALL, 1.0)
        elif self.good % self.RISE_AFTER == 0:
            self.scale = min(self.scale * self.RISE, self.MOST)

    def clear(self) -> None:
        self.engine.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def save(self, path: Path, facts: Mapping) -> None:
        """Every rank writes its part below `<path>.deepspeed/`; `path` itself names the part that is complete."""
        folder, tag = path.with_suffix(".deepspeed"), f"after_{facts['epoch']}_epochs_{facts['done']}_updates"
        try:
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch.save
            raise BadInput(f"{folder / tag}: cannot be written ({error}); free space or fix permissions") from error
        dist.barrier()
        if self.rank == 0:
            checkpoint.save(path, {"deepspeed": tag, "scale": [self.scale, self.good], "facts": dict(facts)})
            for old in folder.glob("after_*_epochs_*"):
                if old.name != tag:
                    shutil.rmtree(old)

    def load(self, path: Path) -> None:
        state = checkpoint.load(path)
        found, _ = self.engine.load_checkpoint(str(path.with_suffix(".deepspeed")), tag=state["deepspeed"])
        if found is None:
            raise BadInput(f"{path}: its part {state['deepspeed']} is missing; start again with run.sh --fresh true")
        self.scale, self.good = state["scale"]


ENGINES = {"torch_ddp": TorchEngine, "deepspeed": DeepSpeedEngine}


def make_engine(model: nn.Module, settings: Mapping, device: torch.device) -> Engine:
    """Return the engine of `train.engine` around `model`."""
    if settings["engine"] not in ENGINES:
        raise BadInput(f"train.engine: '{settings['engine']}' is unknown; one of: {', '.join(ENGINES)}")
    return ENGINES[settings["engine"]](model, settings, device)
