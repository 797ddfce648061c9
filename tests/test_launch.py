"""Several real processes for one run, over gloo."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from commands import Command, free_ports, run_ranks
from safetensors.torch import load_file
from test_resume import logged
from test_run import SMALL, extras, losses, start

from runner import checkpoints, compose, launch, manifest, resume
from runner.__main__ import find_launch
from runner.errors import ConfigError, RunStopped
from runner.run import run

pytestmark = pytest.mark.slow
TWO = ["launch=ddp", "launch.processes=2"]
STEPS = ["trainer.max_steps=4", "trainer.warmup_steps=0", "trainer.logging_steps=1",
         "trainer.per_device_train_batch_size=2", "trainer.per_device_eval_batch_size=4",
         "trainer.learning_rate=1e-2"]  # fmt: skip


def begin(tmp_path, *overrides, name="run"):
    """Make a run directory as ``python -m runner`` does."""
    from runner.__main__ import write_run

    composed = compose.compose([*SMALL, *STEPS, *overrides, f"output_dir={tmp_path / name}"])
    run_dir = compose.claim(composed.run_dir)
    write_run(run_dir, composed.config, composed.choices, list(overrides))
    return run_dir, composed.config["launch"]


def spawn(tmp_path, *words, **options):
    return Command(*SMALL, *STEPS, *words, f"output_dir={tmp_path / 'run'}", cwd=tmp_path, **options)


# Draws that do not depend on which process draws: of a group's two answers one gets the likeliest token, one the next.
DRAWS = """
import torch
def draw(likely, num_samples, **options):
    return likely.topk(2).indices.gather(1, (torch.arange(len(likely)) % 2).unsqueeze(1))
torch.multinomial = draw
"""


def in_ranks(run_dir, first=""):
    """Run a directory in two ranks, as the processes that ``launch`` starts; ``first`` is run in each before."""
    (run_dir / "ranks").mkdir(exist_ok=True)
    own = f"import os\nos.environ['{launch.INSIDE}'] = str(os.getppid())\n"
    run_ranks(run_dir, module="runner.run", first=own + first)


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "reward", "ppo"])
def test_two_processes_train_as_one_does_on_the_same_global_batch(trainer, llama_dir, tmp_path, monkeypatch):
    options = [f"trainer={trainer}", f"model.name_or_path={llama_dir}", "global_batch_size=4", *extras(trainer)]
    if trainer == "grpo":
        monkeypatch.setattr(torch, "multinomial", torch.multinomial)
        exec(DRAWS, {})
    one, _ = start(tmp_path, *STEPS, *options, "trainer.per_device_train_batch_size=4", name="one")
    two, _ = begin(tmp_path, *options, *TWO, name="two")
    in_ranks(two, DRAWS if trainer == "grpo" else "")
    assert manifest.read(two)["status"] == "completed"
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert len(losses(two)) == 4
    norms = [[line["grad_norm"] for line in logged(run_dir) if "grad_norm" in line] for run_dir in (one, two)]
    assert norms[1] == pytest.approx(norms[0], abs=1e-3)
    assert max(norms[1]) > 0.01
    a, b = (load_file(run_dir / "model" / "adapter_model.safetensors") for run_dir in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0)


def test_the_global_batch_is_made_of_what_there_is(llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}", "global_batch_size=8")
    assert manifest.read(run_dir)["chosen"]["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match="global_batch_size=6 cannot be made by 2 processes"):
        compose.compose(["global_batch_size=6", "trainer.per_device_train_batch_size=2", *TWO])


def test_a_rank_that_raises_ends_all_and_is_named(llama_dir, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(
        "import os\n"
        "calls = []\n"
        "def fails(completions, **kwargs):\n"
        "    calls.append(len(completions))\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2: raise ValueError('too bad')\n"
        "    return [float(len(str(c)) % 7) for c in completions]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["reward.function=rewards_of_mine.fails", "allow_code=[rewards_of_mine.fails]", *extras("grpo")[1:]]
    run_dir, node = begin(tmp_path, "trainer=grpo", f"model.name_or_path={llama_dir}", *TWO, *options)
    with pytest.raises(RunStopped, match=r"rank 1: .*too bad"):
        launch.launch(run_dir, node)
    record = manifest.read(run_dir)
    assert record["status"] == "failed"
    assert "too bad" in record["traceback"]


def test_a_rank_that_is_killed_ends_all_within_seconds_and_the_run_goes_on_where_it_was(llama_dir, tmp_path):
    options = [f"model.name_or_path={llama_dir}", *TWO, "global_batch_size=4", "trainer.max_steps=40"]
    options += ["trainer.save_strategy=steps", "trainer.save_steps=5"]
    whole, node = begin(tmp_path, *options, name="whole")
    in_ranks(whole)
    process = spawn(tmp_path, *options)
    process.wait_for("step 12/")
    run_dir = tmp_path / "run"
    os.kill(int((run_dir / "ranks" / "1.pid").read_text()), signal.SIGKILL)
    start = time.monotonic()
    process.end()
    assert time.monotonic() - start < 30
    assert process.returncode == 1
    assert manifest.read(run_dir)["cause"] == "rank 1 was killed by SIGKILL"
    alone = Path(shutil.copytree(run_dir, tmp_path / "alone"))
    assert resume.prepare(run_dir, {}, allow_changes=False)
    launch.launch(run_dir, node)
    assert logged(run_dir) == logged(whole)
    assert manifest.read(run_dir)["result_sha256"] == manifest.read(whole)["result_sha256"]

    assert resume.prepare(alone, {"launch.processes": 1}, allow_changes=False)  # the steps are the same
    run(alone)
    record = manifest.read(alone)
    assert (record["processes"], record["resumes"][-1]["processes"]) == (1, [2, 1])
    a, b = (load_file(one / "model" / "adapter_model.safetensors") for one in (whole, alone))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0)


def test_a_step_keeps_its_rows_when_a_run_goes_on_with_another_number_of_processes(llama_dir, tmp_path):
    options = [f"model.name_or_path={llama_dir}", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    run_dir, _ = start(tmp_path, *options, "trainer.max_steps=2", "launch=ddp", "launch.processes=1")
    manifest.update(run_dir, status="failed")
    with pytest.raises(ConfigError, match=r"cannot be resumed with launch.processes from 1 to 2"):
        resume.prepare(run_dir, {"launch.processes": 2}, allow_changes=False)
    state = run_dir / "checkpoints" / "checkpoint-2" / "runner_state.pt"
    saved = torch.load(state, weights_only=True) | {"processes": 2, "rows": 8}  # as on a machine of two devices
    torch.save(saved, state)
    checkpoints.seal(state.parent, {})
    with pytest.raises(ConfigError, match=r"with 8 rows a step instead of 4. Type global_batch_size=8"):
        run(run_dir)


def test_ranks_that_go_on_in_a_later_epoch_read_what_they_would_have_read(llama_dir, tmp_path):
    options = ["trainer=grpo", f"model.name_or_path={llama_dir}", *extras("grpo"), "trainer.max_steps=7",
               "trainer.per_device_train_batch_size=4"]  # fmt: skip
    whole, _ = begin(tmp_path, *options, *TWO, "trainer.save_strategy=steps", "trainer.save_steps=6", name="whole")
    in_ranks(whole)  # an epoch has four steps
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    shutil.rmtree(parts / "checkpoints" / "checkpoint-7")
    manifest.update(parts, status="failed")
    in_ranks(parts)
    assert manifest.read(parts)["result_sha256"] == manifest.read(whole)["result_sha256"]


def test_a_signal_to_the_parent_lets_all_ranks_end_at_one_step_with_one_checkpoint(llama_dir, tmp_path):
    process = spawn(tmp_path, f"model.name_or_path={llama_dir}", *TWO, "trainer.max_steps=300")  # fmt: skip
    process.wait_for("step 12/")
    process.send_signal(signal.SIGTERM)
    said = process.end()
    assert process.returncode == 143, said
    record = manifest.read(tmp_path / "run")
    last = max(line["step"] for line in logged(tmp_path / "run"))
    assert record["status"] == "preempted"
    assert record["cause"] == f"stopped by SIGTERM, at step {last}"
    folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{last}"
    assert checkpoints.find_fault(folder) is None
    assert (folder / "runner_state_1.pt").exists()


def test_a_signal_before_the_ranks_begin_is_no_failure(llama_dir, tmp_path):
    process = spawn(tmp_path, f"model.name_or_path={llama_dir}", *TWO)
    while not (tmp_path / "run" / "ranks" / "agent.log").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said = process.end()
    assert process.returncode == 130, said
    assert manifest.read(tmp_path / "run")["status"] == "preempted"
    assert manifest.read(tmp_path / "run")["cause"] == "stopped by SIGINT"


def test_a_rank_that_does_not_begin_in_time_ends_the_run(llama_dir, tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(
        "import os, time\n"
        "if os.environ.get('RANK') == '1': time.sleep(1000)\n"
        "def score(completions, **kwargs): return []\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["reward.function=late.score", "allow_code=[late.score]", *extras("grpo")[1:], "launch.start_timeout=5"]
    run_dir, node = begin(tmp_path, "trainer=grpo", f"model.name_or_path={llama_dir}", *TWO, *options)
    with pytest.raises(RunStopped, match="2 of 2 ranks did not begin to train in 5 s"):
        launch.launch(run_dir, node)


def test_processes_that_are_asked_for_without_an_option_have_a_time_to_begin_in_too(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", itertools.count(step=400).__next__)
        launch._watch(command, {**os.environ}, tmp_path, {"processes": 2}, launch.Place())
    assert "2 of 2 ranks did not begin to train in 600 s" in (tmp_path / "start.json").read_text()


@pytest.mark.parametrize(
    ("variables", "needed"),
    [({"WORLD_SIZE": "1"}, True), ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False), ({"WORLD_SIZE": "2"}, False)],
)
def test_a_world_of_one_that_a_container_names_is_no_launcher(variables, needed, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.is_needed({"processes": 2}) is needed
    assert (find_launch(TWO) == {}) is ("LOCAL_RANK" in variables)


# accelerate 1.15 shards on devices only. FSDP2 itself runs over gloo: here the ranks take two CPUs for two devices.
DEVICES = """
import os
from runner import engines
engines.find_missing = lambda *args, **options: []
if "RANK" in os.environ:
    import accelerate.state as state
    begin = state.PartialState.__init__
    def init(self, *args, **options):
        begin(self, *args, **options)
        if self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.MULTI_XPU
    state.PartialState.__init__ = init
"""


def test_two_machines_share_a_run_whose_model_is_split(llama_dir, tmp_path, monkeypatch):
    one, _ = start(
        tmp_path, *STEPS, f"model.name_or_path={llama_dir}", "trainer.per_device_train_batch_size=4", name="one"
    )
    (tmp_path / "sitecustomize.py").write_text(DEVICES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    words = [f"model.name_or_path={llama_dir}", "launch=fsdp2", "launch.processes=1", "launch.nodes=2"]
    words += [f"launch.rendezvous=127.0.0.1:{free_ports()}", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    machines = [spawn(tmp_path, *words, f"launch.node_rank={rank}", first=DEVICES) for rank in (1, 0)]
    said = [machine.end() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    two = tmp_path / "run"
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    record = manifest.read(two)
    assert (record["status"], record["processes"]) == ("completed", 2)
    assert (two / "checkpoints" / "checkpoint-4" / "pytorch_model_fsdp.bin").exists()
    a, b = (load_file(run_dir / "model" / "adapter_model.safetensors") for run_dir in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0)


SLURM = {"SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "node[07-08,11],gpu3", "SLURM_LOCALID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}  # fmt: skip


@pytest.mark.parametrize("error", [ConfigError("no"), RunStopped("no"), SystemExit(0)])
def test_other_machines_end_as_the_first_does_where_it_ends_before_there_is_a_run(error, monkeypatch):
    node = {"nodes": 2, "node_rank": 0, "rendezvous": f"localhost:{free_ports()}", "start_timeout": 30}
    monkeypatch.setattr(launch, "stores", [])
    with ThreadPoolExecutor() as pool:
        other = pool.submit(launch.meet, {**node, "node_rank": 1}, None)
        with pytest.raises(type(error)), launch.leading(node):
            raise error
        assert type(other.exception(timeout=10)) is type(error)


def in_slurm(monkeypatch, **variables):
    for name, value in {**SLURM, **{f"SLURM_{name}": str(value) for name, value in variables.items()}}.items():
        monkeypatch.setenv(name, value)


def test_machines_are_told_by_slurm(monkeypatch):
    node = {"processes": 8, "nodes": "auto"}
    assert launch.place(node) == launch.Place()  # without it
    in_slurm(monkeypatch, STEP_NUM_NODES=4, STEP_NUM_TASKS=4, NODEID=2)
    assert launch.place(node) == launch.Place(4, 2, "node07", 20_000 + 2 * 3456)
    assert launch.world(node) == 32
    launch.adopt_tasks(node)
    assert "WORLD_SIZE" not in os.environ
    in_slurm(monkeypatch, STEP_NUM_NODES=4, STEP_NUM_TASKS=8, NODEID=2)
    with pytest.raises(ConfigError, match="--ntasks-per-node=1"):
        launch.place(node)


def test_tasks_of_slurm_are_ranks_of_one_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are as before afterwards
        monkeypatch.delenv(name)
    launch.adopt_tasks({"processes": 1})
    assert not launch.is_led()
    monkeypatch.setenv("WORLD_SIZE", "1")  # as some containers do
    in_slurm(monkeypatch, STEP_NUM_NODES=4, STEP_NUM_TASKS=8, PROCID=5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # srun --gpus-per-task=1: the only one that this task sees
    launch.adopt_tasks({"processes": 1})
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("5", "8", "0")
    assert (os.environ["MASTER_ADDR"], os.environ["LOCAL_WORLD_SIZE"]) == ("node07", "2")
    assert launch.is_led()


def test_processes_that_accelerate_loses_are_refused(tmp_path):
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "runner", "trainer.max_steps=1"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "accelerate launch was asked for several processes and has started one" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_no_rank_is_left_behind_when_the_parent_is_killed(tmp_path):
    (tmp_path / "ranks").mkdir()
    rank = "import sys, time; from pathlib import Path; from runner import launch\n"
    (tmp_path / "rank.py").write_text(rank + "launch.register(Path(sys.argv[1])); time.sleep(1000)\n")
    agent = [sys.executable, "-m", "runner.launch", "--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py")]
    parent = f"import os, subprocess; os.environ[{launch.INSIDE!r}] = str(os.getpid());"
    parent += f"subprocess.run({[*agent, str(tmp_path)]})"
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    while len(found := list((tmp_path / "ranks").glob("*.pid"))) < 2:
        time.sleep(0.1)
    process.kill()
    until = time.monotonic() + 20
    for pid in [int(path.read_text()) for path in found]:
        while psutil.pid_exists(pid) and time.monotonic() < until:
            time.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_that_somebody_else_starts_share_one_directory(launcher, llama_dir, tmp_path):
    words = [*SMALL, *STEPS, f"model.name_or_path={llama_dir}"]
    if launcher == "torchrun":
        started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "runner", *words]
        subprocess.run([sys.executable, *started], cwd=tmp_path, check=True)
    else:  # which starts each task with nothing but these variables
        job = {**SLURM, "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1"}
        job |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
        told = [os.environ | job | {"SLURM_PROCID": task, "SLURM_LOCALID": task} for task in "10"]
        tasks = [Command(*words, cwd=tmp_path, env=variables) for variables in told]
        said = [task.end() for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], said
    (found,) = (tmp_path / "outputs").glob("*/*/manifest.json")
    record = json.loads(found.read_text())
    assert (record["status"], record["processes"]) == ("completed", 2)
    assert len(losses(found.parent)) == 4
