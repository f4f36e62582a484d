"""Training: the same update however it is split, the same end however often it was killed, honest numbers."""

import copy
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from training_child import SETTINGS, Line, batches, make_task, run

from cosyvoice_ft import checkpoint, engine, memory, training
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.schedules import schedule

CPU = torch.device("cpu")


def one_update(group, model, **changes):
    model = copy.deepcopy(model)
    machine = engine.make_engine(model, SETTINGS | changes, CPU)
    task = make_task(None, **changes)
    return training.one_update(machine, group, 0.1, task), model.state_dict()


def joined(parts):
    whole = {key: torch.cat([part[key] for part in parts]) for key in ("x", "y")}
    utts = [utt for part in parts for utt in part["utts"]]
    return whole | {"count": float(len(utts)), "utts": utts, "positions": len(utts), "padded": len(utts)}


def test_update_does_not_depend_on_how_it_is_split():
    """Batches of 3 + 5 + 2 in one micro-batch or in three: the same loss, gradient norm and weights."""
    model, parts = Line(dropout=0), list(batches(1))[:3]
    (split, after_split), (whole, after_whole) = one_update(parts, model), one_update([joined(parts)], model)
    for key in split:
        torch.testing.assert_close(split[key], whole[key], rtol=1e-5, atol=0)
    for name in after_split:
        torch.testing.assert_close(after_split[name], after_whole[name], rtol=1e-5, atol=1e-6)


def test_epochs_are_saved_and_leftover_batches_are_an_update(tmp_path):
    lines = []
    machine, progress = run(tmp_path, log=lines.append)
    assert (progress.epoch, progress.step) == (3, 12)  # 7 batches, 2 an update: 4 updates an epoch
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"epoch_{n}.{end}" for n in (1, 2, 3) for end in ("pt", "yaml")), "last.pt",
    }  # fmt: skip
    saved, weights = checkpoint.load_weights(tmp_path / "epoch_3.pt"), machine.weights()
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    facts = checkpoint.epochs(tmp_path)
    cv = facts[3]["cv"]
    assert (
        cv["loss"] == pytest.approx((cv["loss_full"] + cv["loss_streaming"]) / 2)
        and cv["loss"] < facts[1]["cv"]["loss"]
    )
    said = "\n".join(lines)
    assert (
        "epoch 0 CV" in said
        and "epoch 1 step 2 loss" in said
        and "epoch 1 step 4 loss" in said
        and "tokens_per_s" in said
    )


def test_finished_says_so_and_more_epochs_go_on(tmp_path):
    run(tmp_path / "a", max_epoch=2)
    before = (tmp_path / "a/last.pt").read_bytes()
    lines = []
    run(tmp_path / "a", max_epoch=2, log=lines.append)
    assert "finished already: 2 epochs, 8 updates" in lines[-1] and (tmp_path / "a/last.pt").read_bytes() == before
    lines.clear()
    on, _ = run(tmp_path / "a", max_epoch=3, log=lines.append)
    assert "goes on from" in lines[0] and "2 of 3 epochs" in lines[0]
    straight, _ = run(tmp_path / "b", max_epoch=3)
    assert all(torch.equal(a, b) for a, b in zip(on.weights().values(), straight.weights().values(), strict=True))


def test_another_training_is_not_overwritten(tmp_path):
    run(tmp_path, max_epoch=1)
    with pytest.raises(BadInput, match=r"another training: train.lr was 0.01, is 0.02. Set it back, or .*--fresh"):
        run(tmp_path, max_epoch=2, lr=0.02)


def killed(folder, moment):
    """Start the training in a process of its own, kill it `moment` seconds after it began or went on."""
    command = [sys.executable, "tests/training_child.py", str(folder), "max_epoch=4"]
    env = os.environ | {"PYTHONPATH": "."}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    while (line := child.stdout.readline()) and "epoch" not in line:
        pass
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    child.communicate()


def test_killed_at_ten_moments_ends_with_the_same_weights(tmp_path, root, monkeypatch):
    """save_minutes is next to nothing, so that kills fall between updates, into saving, and after epochs."""
    monkeypatch.chdir(root)
    straight, _ = run(tmp_path / "straight", max_epoch=4)
    draw = random.Random(0)
    resumed = 0
    for _ in range(10):
        killed(tmp_path / "killed", draw.uniform(0.05, 0.6))
        resumed += (tmp_path / "killed/last.pt").is_file()
    again, progress = run(tmp_path / "killed", max_epoch=4)
    assert resumed > 0 and progress.step == 16
    for name, weight in straight.weights().items():
        assert torch.equal(weight, again.weights()[name]), name
    for epoch in sorted(checkpoint.epochs(tmp_path / "straight")):
        a, b = (checkpoint.load_weights(tmp_path / d / f"epoch_{epoch}.pt") for d in ("straight", "killed"))
        assert all(torch.equal(a[name], b[name]) for name in a), epoch


def test_gradients_that_are_not_finite_change_nothing_and_then_stop(tmp_path):
    def bad(epoch, skip=0):
        for batch in batches(epoch, skip):
            yield batch | {"y": batch["y"] * float("nan")}

    before = {name: value.clone() for name, value in Line().state_dict().items()}
    model = Line()
    with pytest.raises(BadInput, match="not finite 3 times in a row, last with u4_0 u5_0"):
        run(tmp_path, model, make_batches=bad)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    (one, other) = checkpoint.load(tmp_path / "bad_batch.pt")["batches"]
    assert one["utts"][0] == "u4_0" and one["x"].shape == (1, 4) and other["y"].isnan().all()

    def one_bad(epoch, skip=0):
        for number, batch in enumerate(batches(epoch, skip)):
            yield batch | {"y": batch["y"] * (float("nan") if number == 2 else 1)}

    lines = []
    machine, progress = run(tmp_path / "b", make_batches=one_bad, log=lines.append)
    assert progress.step == 9 and all(torch.isfinite(value).all() for value in machine.weights().values())
    assert sum("1 of the last" in line for line in lines) == 3


class Hungry(Line):
    """Has memory for four rows."""

    def forward(self, x, y):
        if self.training and len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x, y)


def halves(batch):
    n = len(batch["utts"]) // 2
    facts = {"positions": n, "padded": n}
    return [
        {
            "x": batch["x"][part],
            "y": batch["y"][part],
            "utts": batch["utts"][part],
            "count": float(len(batch["utts"][part])),
        }
        | facts
        for part in (slice(0, n), slice(n, None))
    ]


def test_out_of_memory(tmp_path):
    with pytest.raises(BadInput, match="out of memory: lower train.llm.max_batch from 100 to 3, or set"):
        run(tmp_path, Hungry())
    parts = list(batches(1))[1:4]
    enough, after_enough = one_update(parts, Line(dropout=0))
    machine = engine.make_engine(Hungry(dropout=0), SETTINGS, CPU)
    task = make_task(None, auto_batch=True, log=lambda line: None)
    task.split = halves
    sums = training.one_update(machine, parts, 0.1, task)
    torch.testing.assert_close(sums["loss"], enough["loss"], rtol=1e-5, atol=0)
    for name, value in machine.weights().items():
        torch.testing.assert_close(value, after_enough[name], rtol=1e-5, atol=1e-6)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, root):
    """RLIMIT_FSIZE: no file may grow beyond what last.pt has; the next save fails."""
    run(tmp_path, max_epoch=1)
    before = (tmp_path / "last.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    command = [sys.executable, "tests/training_child.py", str(tmp_path), "max_epoch=3"]
    env = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, preexec_fn=limit, env=env)
    assert done.returncode == 1 and "cannot be written" in done.stderr and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob(".*part"))


def test_best_and_last_epochs_are_kept(tmp_path):
    run(tmp_path, max_epoch=8, keep_best=1, keep_last=2)
    facts = checkpoint.facts(tmp_path)
    best = min(facts, key=lambda epoch: facts[epoch]["cv"]["loss"])
    assert sorted(facts) == list(range(1, 9)) and set(checkpoint.epochs(tmp_path)) == {best, 7, 8}


def test_patience(tmp_path):
    lines = []
    _, progress = run(tmp_path, max_epoch=50, patience=2, lr=0.5, log=lines.append)
    losses = {epoch: facts["cv"]["loss"] for epoch, facts in checkpoint.facts(tmp_path).items()}
    assert progress.epoch < 50 and progress.epoch - min(losses, key=losses.get) == 2
    assert "has not fallen for 2 epochs" in lines[-1]


def test_what_fails_while_listening_does_not_end_the_training(tmp_path):
    lines = []
    task = make_task(tmp_path, log=lines.append, max_epoch=1)
    task.listen = lambda epoch: 1 / 0
    progress = training.train(engine.make_engine(Line(), task.settings, CPU), task)
    assert progress.epoch == 1 and sum("ZeroDivisionError" in line for line in lines) == 2


def test_freeze():
    model = Line()
    assert engine.freeze(model, ["^wide"]) == 4 * 64 + 64
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["linear.weight", "linear.bias"]
    with pytest.raises(BadInput, match="'narrow' matches no parameter; names are like wide.weight"):
        engine.freeze(model, ["narrow"])
    with pytest.raises(BadInput, match="nothing is left to train"):
        engine.freeze(model, ["."])


def test_recomputed_activations_give_the_same_gradients():
    model, (batch, *_) = Line(dropout=0), batches(1)
    plain, recomputed = copy.deepcopy(model), copy.deepcopy(model)
    memory.recompute([recomputed.wide])
    for one in (plain, recomputed):
        one(batch["x"], batch["y"])["loss"].backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": "sgdw"}, "'sgdw' is unknown; one of: adamw, adamw8bit"),
        ({"engine": "horovod"}, "'horovod' is unknown; one of: torch_ddp, deepspeed"),
        ({"dtype": "fp8"}, "'fp8' is unknown; one of: auto"),
        ({"dtype": "fp16"}, "fp16 needs loss scaling"),
    ],
)
def test_unknown_settings(changes, says):
    with pytest.raises(BadInput, match=says):
        engine.make_engine(Line(), SETTINGS | changes, CPU)


def test_schedules():
    rate = schedule(SETTINGS)
    assert [rate(step) for step in (0, 1, 3, 4, 100)] == pytest.approx([2.5e-3, 5e-3, 1e-2, 1e-2, 1e-2])
    cosine = {"schedule": "cosine", "lr": 1.0, "warmup_updates": 10, "max_updates": 110, "min_lr": 0.1}
    assert [schedule(cosine)(step) for step in (9, 10, 60, 110, 500)] == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])
    with pytest.raises(BadInput, match="'cosin' is unknown; one of"):
        schedule(SETTINGS | {"schedule": "cosin"})
    with pytest.raises(BadInput, match="train.max_updates, which is not set"):
        schedule(cosine | {"max_updates": None})


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
