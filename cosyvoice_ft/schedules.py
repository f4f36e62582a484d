"""Learning rates as functions of the number of updates done: `learning_rate(step)` is the rate of the next update."""

from collections.abc import Callable

from cosyvoice_ft.files import BadInput


def constant(step: int, lr: float) -> float:
    """lr, always."""
    return lr


def warmup_constant(step: int, lr: float, *, warmup_updates: int) -> float:
    """Linear from lr / warmup_updates, then constant."""
    return lr * min(1.0, (step + 1) / max(warmup_updates, 1))


SCHEDULES = {"constant": constant, "warmup_constant": warmup_constant}


def schedule(settings: dict) -> Callable[[int], float]:
    """Return step -> learning rate for the settings of a training (`schedule`, `lr`, `warmup_updates`)."""
    name, lr = settings["schedule"], settings["lr"]
    if name not in SCHEDULES:
        raise BadInput(f"train.schedule: '{name}' is unknown; one of: {', '.join(SCHEDULES)}")
    if name == "constant":
        return lambda step: constant(step, lr)
    return lambda step: warmup_constant(step, lr, warmup_updates=settings["warmup_updates"])
