"""Learning rates as functions of the number of updates done: `schedule(settings)(step)` is the rate of the next update.

s updates done, n = s + 1; w warmup_updates; h hold_updates; N max_updates; r decay_rate

constant         lr
warmup_constant  lr min(1, n / w)
warmup           lr sqrt(w) min(n^-1/2, n w^-3/2), highest at n = w; w = 0: lr n^-1/2     (Noam: Vaswani et al., 2017)
noam_hold        lr (s + 1) / (w + 1) while s <= w; lr until s = w + h; then lr max(1, w^r) / max(1, (s - h)^r),
                 at least min_lr; min_lr after N                       (NeMo's NoamHoldAnnealing)
cosine           as warmup_constant, then min_lr + (lr - min_lr) (1 + cos(pi (s - w) / (N - w))) / 2
"""

import math
from collections.abc import Callable, Mapping

from cosyvoice_ft.files import BadInput


def constant(s: int, lr: float) -> float:
    return lr


def warmup_constant(s: int, lr: float, *, warmup_updates: int) -> float:
    return lr * min(1.0, (s + 1) / max(warmup_updates, 1))


def warmup(s: int, lr: float, *, warmup_updates: int) -> float:
    n, w = s + 1, warmup_updates
    return lr * n**-0.5 if w == 0 else lr * w**0.5 * min(n**-0.5, n * w**-1.5)


def noam_hold(
    s: int, lr: float, *, warmup_updates: int, hold_updates: int, max_updates: int, decay_rate: float, min_lr: float
) -> float:
    w, h = warmup_updates, hold_updates
    if s <= w and w > 0:
        return lr * (s + 1) / (w + 1)
    if s <= w + h:
        return lr
    if s > max_updates:
        return min_lr
    return max(lr * max(1.0, w**decay_rate) / max(1.0, (s - h) ** decay_rate), min_lr)


def cosine(s: int, lr: float, *, warmup_updates: int, max_updates: int, min_lr: float) -> float:
    w, total = warmup_updates, max_updates
    if s < w:
        return warmup_constant(s, lr, warmup_updates=w)
    share = min(1.0, (s - w) / max(total - w, 1))
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2


KEYS = {
    constant: (),
    warmup_constant: ("warmup_updates",),
    warmup: ("warmup_updates",),
    noam_hold: ("warmup_updates", "hold_updates", "max_updates", "decay_rate", "min_lr"),
    cosine: ("warmup_updates", "max_updates", "min_lr"),
}


def schedule(settings: Mapping) -> Callable[[int], float]:
    """Return step -> learning rate for the settings of a training: `schedule`, `lr` and the keys of that schedule.

    Raises BadInput for an unknown name, and where `max_updates` is needed and not set.
    """
    known = {function.__name__: function for function in KEYS}
    function = known.get(settings["schedule"])
    if function is None:
        raise BadInput(f"train.schedule: '{settings['schedule']}' is unknown; one of: {', '.join(known)}")
    own = {key: settings[key] for key in KEYS[function]}
    if own.get("max_updates", 0) is None:
        raise BadInput(f"train.schedule: {settings['schedule']} ends at train.max_updates, which is not set; set it")
    return lambda step: function(step, settings["lr"], **own)
