"""Training in several processes, on several machines, with DeepSpeed: the same weights, and one death ends all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch

from cosyvoice_ft import checkpoint

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that is free, and the next one too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def packed(run):
    """Stages -1 to 3 of conf/tiny.yaml."""
    run("--conf", "conf/tiny.yaml", "--stop_stage", 3)


@pytest.fixture(scope="module")
def llm_words():
    """One epoch of the llm in small batches, without listening."""
    words = ["--conf", "conf/tiny.yaml", "--train.listen_seconds=0", "--train.llm.max_epoch=1", "--train.num_workers=0"]
    return [*words, "--train.llm.max_batch=1000"]


@pytest.fixture(scope="module")
def one_process(clone, packed, run_tool, llm_words, tmp_path_factory):
    """The weights after an epoch of one process with two batches an update."""
    out = tmp_path_factory.mktemp("one") / "llm"
    run_tool("tools/train.py", "llm", "data/tiny", out, *llm_words, "--train.accum_grad=2", cwd=clone)
    return checkpoint.load_weights(out / "epoch_1.pt")


def assert_same(weights: dict, path) -> None:
    for key, value in checkpoint.load_weights(path).items():
        torch.testing.assert_close(value, weights[key], atol=2e-5, rtol=1e-3, msg=f"{path} {key}")


def test_two_machines_under_slurm(clone, one_process, llm_words, tmp_path):
    """local/slurm.sh with a srun that starts both machines here: the same update as one process."""
    commands = {
        "scontrol": 'echo "127.0.0.1"\n',
        "srun": 'shift\nSLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"\nwait $!\n',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{body}")
        (tmp_path / name).chmod(0o755)
    (clone / "data/slurm").symlink_to("tiny")
    slurm = {
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(clone),
    }
    env = (
        os.environ | ONE_THREAD | slurm | {"MASTER_PORT": str(free_port()), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    command = ["bash", "local/slurm.sh", *llm_words, "--name", "slurm", "--stop_stage", "4"]
    done = subprocess.run(command, cwd=clone, text=True, capture_output=True, env=env, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("epoch 1 CV") == 1
    assert_same(one_process, clone / "exp/slurm/llm/epoch_1.pt")


def test_deepspeed_from_training_to_speech(clone, run, one_process, llm_words, run_tool):
    """ZeRO-2 on two processes: the weights of one process; finished says so; its checkpoints are averaged and speak."""
    (clone / "data/deepspeed").symlink_to("tiny")
    words = [*llm_words, "--name", "deepspeed", "--nproc", 2, "--train.engine=deepspeed", "--train.flow.max_epoch=1"]
    run(*words, "--stage", 4, "--stop_stage", 4)
    assert_same(one_process, clone / "exp/deepspeed/llm/epoch_1.pt")
    said = run(*words, "--stage", 4, "--stop_stage", 7, "--tune", "llm").stdout
    assert "finished already: 1 epochs" in said and "6 of 6 sentences" in said
    screen = said.split("stages 4 to 7 done")[1]
    for line in ("sentences  seconds  level dBFS  similarity", "\n  natural ", "\n  base ", "\n  tuned ", " of 6\n"):
        assert line in screen, line


def test_deepspeed_goes_on_and_skips_what_is_not_finite(root, tmp_path, run_tool):
    """One process, CPU offload: killed by the end of its epochs it goes on; a NaN changes nothing and is counted."""
    ours = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "ds.json").write_text(json.dumps(ours))
    words = ["engine=deepspeed", f"deepspeed={tmp_path / 'ds.json'}", "max_bad_steps=2"]
    child = ["tests/training_child.py", tmp_path / "a"]
    run_tool(*child, *words, "max_epoch=1", env=ONE_THREAD)
    again = run_tool(*child, *words, "max_epoch=2", env=ONE_THREAD).stdout
    assert "goes on from" in again and "1 of 2 epochs" in again and "8 steps, finite True" in again
    run_tool(child[0], tmp_path / "b", *words, "max_epoch=2", env=ONE_THREAD)
    a, b = (checkpoint.load_weights(tmp_path / name / "epoch_2.pt") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    said = run_tool(child[0], tmp_path / "c", *words, "max_epoch=2", "batches=broken", env=ONE_THREAD).stdout
    assert said.count("1 of the last") == 2 and "6 steps, finite True" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3; 1 or 2"),
        ({"optimizer": {}, "zero_optimization": {"stage": 2}}, "'optimizer' is set by the conf"),
        ({"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}, "'gradient_clipping' is set by the conf"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "'bf16' is set by the conf"),
    ],
)
def test_a_json_that_contradicts_the_conf_is_refused(content, says, tmp_path):
    from training_child import SETTINGS, Line

    from cosyvoice_ft import engine
    from cosyvoice_ft.files import BadInput

    (tmp_path / "ds.json").write_text(json.dumps(content))
    settings = SETTINGS | {"engine": "deepspeed", "deepspeed": str(tmp_path / "ds.json")}
    with pytest.raises(BadInput, match=says):
        engine.make_engine(Line(), settings, torch.device("cpu"))


def start_machines(cwd, *command) -> list[subprocess.Popen]:
    """Two launchers of one process each, as on two machines."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--master_addr=127.0.0.1"]
    launch += ["--nproc_per_node=1", f"--master_port={free_port()}"]
    options = {"cwd": cwd, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    env = os.environ | ONE_THREAD | {"PYTHONPATH": str(cwd)}
    return [
        subprocess.Popen([*launch, f"--node_rank={number}", *map(str, command)], env=env, **options)
        for number in (0, 1)
    ]


def send(machine: subprocess.Popen, number: signal.Signals) -> None:
    """To the launcher and to the training it launched."""
    for process in [*psutil.Process(machine.pid).children(recursive=True), machine]:
        process.send_signal(number)


def what_is_left(machines: list[subprocess.Popen], number: signal.Signals) -> tuple[int, str, float]:
    """Wait for the first epoch, strike the second machine; return the first's status, words, and seconds to its end."""
    try:
        for line in machines[0].stdout:
            if "epoch 1 CV" in line:
                break
        send(machines[1], number)
        struck = time.monotonic()
        said, _ = machines[0].communicate(timeout=90)
        return machines[0].returncode, said, time.monotonic() - struck
    finally:
        for machine in machines:
            if machine.poll() is None:
                send(machine, signal.SIGKILL)
            machine.communicate()


def test_a_machine_that_dies_ends_the_other_within_a_minute(clone, packed, tmp_path):
    """SIGKILL of all on one machine while it trains without end."""
    command = ["tools/train.py", "llm", "data/tiny", tmp_path / "llm", "--conf", "conf/tiny.yaml"]
    command += ["--train.llm.max_epoch=100000", "--train.patience=0", "--train.listen_seconds=0"]
    machines = start_machines(clone, *command, "--train.num_workers=0", "--train.llm.max_batch=1000")
    status, said, seconds = what_is_left(machines, signal.SIGKILL)
    assert status != 0 and seconds < 60, f"{seconds:.0f} s\n{said[-3000:]}"


def test_a_machine_that_falls_silent_is_given_up(root, tmp_path):
    """SIGSTOP: no connection breaks, nobody answers. After 10 looks, here 0.5 s apart, the other one ends."""
    command = ["tests/training_child.py", tmp_path, "max_epoch=100000", "poll=0.5"]
    status, said, seconds = what_is_left(start_machines(root, *command), signal.SIGSTOP)
    assert status != 0 and 4 < seconds < 30, f"{seconds:.0f} s\n{said[-3000:]}"
    assert "another process failed: rank 1 gave no sign of life for 5 s" in said, said[-3000:]


def test_a_process_that_fails_tells_the_others_why(clone, packed, tmp_path):
    """Two processes; the second cannot write its file after an epoch: both end, and say whose fault it was."""
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "tools/train.py", "llm", "data/tiny", tmp_path / "llm"]
    command += ["--conf", "conf/tiny.yaml", "--train.listen_seconds=0", "--train.num_workers=0", "--train.lr=1e30"]
    command += [
        "--train.llm.max_batch=1000",
        "--train.warmup_updates=0",
        "--train.max_bad_steps=2",
        "--train.log_every=2",
    ]
    env = os.environ | ONE_THREAD | {"PYTHONPATH": str(clone)}
    start = time.monotonic()
    done = subprocess.run([*map(str, command)], cwd=clone, text=True, capture_output=True, env=env, timeout=100)
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert "the gradient was not finite 2 times in a row, last with" in done.stderr
    for rank, name in enumerate(("bad_batch.pt", "bad_batch_rank1.pt")):
        assert checkpoint.load(tmp_path / "llm" / name)["batches"][0]["utts"], rank
