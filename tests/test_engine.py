"""The training loop: the same update however it is split, honest numbers, going on where it stopped."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cosyvoice_ft import checkpoint, engine
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.schedules import schedule

SETTINGS = {
    "lr": 1e-2, "schedule": "warmup_constant", "warmup_updates": 4, "grad_clip": 1.0, "weight_decay": 0.01,
    "dtype": "fp32", "accum_grad": 2, "max_epoch": 3, "log_every": 2, "max_bad_steps": 2,
}  # fmt: skip
CPU = torch.device("cpu")


class Line(nn.Module):
    """y = w x + b with dropout on x; the loss is a sum of squares."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 1), nn.Dropout(0.1)

    def forward(self, x, y):
        return {"loss": ((self.linear(self.dropout(x))[:, 0] - y) ** 2).sum()}


def batches(epoch, sizes=(3, 5, 2, 4, 1)):
    """Five batches of different sizes, the same for the same epoch."""
    rng = np.random.default_rng(epoch)
    for n in sizes:
        x = torch.from_numpy(rng.standard_normal((n, 4)).astype(np.float32))
        yield {"x": x, "y": x.sum(1), "count": float(n), "utts": [f"u{i}" for i in range(n)]}


def trained(folder, **changes):
    settings = SETTINGS | changes
    torch.manual_seed(0)
    lines = []
    machine = engine.TorchEngine(Line(), settings, CPU)
    state = engine.train(
        machine,
        settings=settings,
        train_batches=batches,
        cv_batches={"full": lambda: batches(99), "streaming": lambda: batches(98)},
        learning_rate=schedule(settings),
        folder=folder,
        seed=7,
        log=lines.append,
        writer=None,
    )
    return machine.module.state_dict(), state, lines


def one_update(group, model):
    model = copy.deepcopy(model)
    model.dropout.p = 0.0
    machine = engine.TorchEngine(model, SETTINGS, CPU)
    sums = engine.one_update(machine, group, 0.1)
    return sums, model.linear.weight


def test_update_does_not_depend_on_how_it_is_split():
    """Batches of 3 + 5 + 2 in one micro-batch or in three: the same loss, gradient norm and weights."""
    model, parts = Line(), list(batches(1))[:3]
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("x", "y")}
    joined |= {"count": 10.0, "utts": sum((part["utts"] for part in parts), [])}
    (split, weight_split), (whole, weight_whole) = one_update(parts, model), one_update([joined], model)
    assert split == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(weight_split, weight_whole)
    by_hand = ((model.linear(joined["x"])[:, 0] - joined["y"]) ** 2).mean()
    assert split["loss"] / split["count"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_epochs_are_saved_and_leftover_batches_are_an_update(tmp_path):
    weights, state, lines = trained(tmp_path)
    assert (state.epoch, state.step) == (3, 9)  # 5 batches, 2 an update: 3 updates an epoch
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch_1.pt", "epoch_1.yaml", "epoch_2.pt", "epoch_2.yaml", "epoch_3.pt", "epoch_3.yaml", "last.pt",
    ]  # fmt: skip
    saved = checkpoint.load_weights(tmp_path / "epoch_3.pt")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    facts = checkpoint.epochs(tmp_path)
    assert facts[3]["cv"]["loss"] == pytest.approx((facts[3]["cv"]["loss_full"] + facts[3]["cv"]["loss_streaming"]) / 2)
    assert facts[3]["cv"]["loss"] < facts[1]["cv"]["loss"] and facts[3]["step"] == 9
    assert any("CV" in line for line in lines) and any("step 2 " in line for line in lines)


def test_resumed_is_the_same_as_never_stopped(tmp_path):
    straight, _, _ = trained(tmp_path / "a")
    trained(tmp_path / "b", max_epoch=1)
    resumed, _, lines = trained(tmp_path / "b")
    assert "goes on from" in lines[0] and "epoch 1 of 3" in lines[0]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_gradient_that_is_not_finite_changes_nothing_and_then_stops(tmp_path):
    settings = SETTINGS | {"max_epoch": 1, "accum_grad": 1}
    machine = engine.TorchEngine(Line(), settings, CPU)
    before = copy.deepcopy(machine.module.state_dict())

    def bad(epoch):
        for batch in batches(epoch):
            yield batch | {"y": batch["y"] * float("nan")}

    with pytest.raises(BadInput, match=r"not finite 2 times in a row, last with u0 u1 u2 u3 u4"):
        engine.train(
            machine, settings=settings, train_batches=bad, cv_batches={"full": lambda: batches(9)},
            learning_rate=schedule(settings), folder=tmp_path, seed=0, log=lambda line: None, writer=None,
        )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in machine.module.state_dict().items())


def test_best_epochs_and_average(tmp_path):
    for epoch, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        weights = {"w": torch.full((2,), float(epoch)), "n": torch.tensor(epoch)}
        checkpoint.save_epoch(tmp_path, epoch, weights | {"tied": weights["w"]}, {"cv": {"loss": loss}})
    (tmp_path / "epoch_4.yaml").write_text("cv: {loss: 0.1}\n")  # its weights were never finished
    assert checkpoint.best_epochs(tmp_path, 2) == [2, 3] and checkpoint.best_epochs(tmp_path, 9) == [2, 3, 1]
    mean = checkpoint.average([tmp_path / "epoch_2.pt", tmp_path / "epoch_3.pt"])
    assert mean["w"].tolist() == [2.5, 2.5] and mean["n"].dtype == torch.int64
    assert mean["w"].data_ptr() == mean["tied"].data_ptr()


def test_only_plain_weights_are_loaded(tmp_path):
    torch.save({"w": torch.zeros(1), "code": print}, tmp_path / "bad.pt")
    with pytest.raises(BadInput, match="refused, it holds more than tensors"):
        checkpoint.load_weights(tmp_path / "bad.pt")
    torch.save({"w": torch.zeros(1000)}, tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    with pytest.raises(BadInput, match="not a complete weights file"):
        checkpoint.load_weights(tmp_path / "cut.pt")
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "last.pt")
    with pytest.raises(BadInput, match="not a flat dict of tensors"):
        checkpoint.load_weights(tmp_path / "last.pt")
    with pytest.raises(BadInput, match="no such file"):
        checkpoint.load_weights(tmp_path / "none.pt")


def test_learning_rate():
    rate = schedule(SETTINGS)
    assert [rate(step) for step in (0, 1, 3, 4, 100)] == pytest.approx([2.5e-3, 5e-3, 1e-2, 1e-2, 1e-2])
    with pytest.raises(BadInput, match="'cosin' is unknown; one of"):
        schedule(SETTINGS | {"schedule": "cosin"})
