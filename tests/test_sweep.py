"""Sweeps: what they try, what they refuse before the first trial, and what is left when they are killed."""

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
import torch
import yaml
from filelock import FileLock
from test_compose import write_recipe
from test_run import BATCH, QUICK, SMALL, lines

from runner import compose, journal, launch, leaderboard, manifest, search, sweep, trials
from runner.config import flat, option_names
from runner.errors import ConfigError
from runner.leaderboard import Row
from runner.run import run as train
from runner.trials import Trial

KILLS = 4  # of one sweep, at random moments
RATE = "trainer.learning_rate=tag(log,interval(1e-4,1e-1))"
STEPPED = ["trainer.max_steps=4", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "samples.rows=0"]


def words(model, *overrides):
    return [*SMALL, *QUICK, *BATCH, f"model.name_or_path={model}", *overrides]


def run(folder, *overrides):
    """Run a sweep in this process, its trials in theirs; returns the exit code."""
    return sweep.run(search.read(list(overrides)), folder, list(overrides))


def board(folder):
    """Read leaderboard.csv by number of the trial."""
    with (folder / "leaderboard.csv").open() as file:
        return {int(row["number"]): row for row in csv.DictReader(file)}


def refusal(*overrides, **where):
    with pytest.raises(ConfigError) as error:
        search.prepare(list(overrides), **where)
    return str(error.value)


# ---- what is tried ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer=sft,dpo", "trainer.learning_rate=1e-5,1e-4", "seed=1"],
        ["seed=range(1,4)", "peft=lora,none", "model.pad_token='a b',c"],
        ["trainer=glob(*po)", "+trainer.report_to=choice([none],none)"],
        ["peft.r=8,16", "seed=1,2", "peft.r=4,2"],
    ],
)
def test_a_grid_has_hydras_combinations_in_hydras_order(overrides):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    class Options:
        """What Hydra asks for the options of a group."""

        def get_group_options(self, group, results_filter=None):
            return option_names(group)

    parsed = OverridesParser.create(config_loader=Options()).parse_overrides(overrides)
    hydras = [set(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]
    axes, fixed = search._split(list(zip(overrides, compose.parse(overrides), strict=True)))
    plan = search.Plan(search.schema.Search(), axes, fixed, [], {}, [], "", [], {})
    ours = [{*fixed, *(axis.text(value) for axis, value in zip(axes, cell, strict=True))} for cell in plan.grid]
    assert ours == hydras


def test_every_value_is_composed_once_before_the_first_trial():
    axes, _ = search._split([(t, compose.parse([t])[0]) for t in ["trainer=sft,dpo", "seed=int(interval(1,9))"]])
    assert search.corners(axes) == [["trainer=sft", "seed=1"], ["trainer=dpo", "seed=1"], ["trainer=sft", "seed=9"]]


def test_a_trial_is_the_run_that_its_check_composed():
    plan = search.read(["search=grid", "trainer.beta=0.1,0.5", "trainer=dpo"])
    assert list(plan.composed) == [("trainer.beta=0.1",), ("trainer.beta=0.5",)]
    for own, composed in plan.composed.items():
        alone = compose.compose(["trainer=dpo", *own])
        apart = {"search": None, "output_dir": None}  # the one is no part of a run, the other is its own
        for found, wanted in ((composed.config, alone.config), (composed.choices, alone.choices)):
            assert {**found, **apart} == {**wanted, **apart}


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["seed=1"], "There is nothing to sweep"),
        (["trainer.lerning_rate=1,2"], "did you mean trainer.learning_rate"),
        (["trainer=sft,dpoo"], "did you mean trainer=dpo"),
        (["trainer=dpo,sft", "trainer.beta=0.1,0.2"], "trainer=dpo"),
        (["peft.r=8,many"], "peft.r takes int, found 'many'"),
        (["search=tpe", "peft.r=interval(1,8)"], "int(interval("),
        (["search=tpe", "seed=int(interval(9,1))"], "from low to high"),
        ([RATE], "search=grid cannot try all values"),
        (["seed=shuffle(range(1,4))"], "search=random"),
        (["search=tpee", "seed=1,2"], "search=tpe"),
        (["seed=1,2", "search.n_trails=3"], "did you mean search.n_trials"),
        (["search=tpe,random", "seed=1,2"], "cannot be swept"),
        (["output_dir=a,b"], "output_dir has no effect in a sweep"),
        (["seed=1,2", "search.objective=eval_los"], "did you mean eval_loss"),
        (["seed=1,2", "search.objective=objective/scores"], "nothing that trainer=sft logs"),
        (["trainer=dpo", "seed=1,2", "search.objective=eval_rewards/margin"], "did you mean eval_rewards/margins"),
        (["seed=1,2", "search.objective=eval_loss", "dataset=local", "dataset.path=a", "dataset.eval=null"],
         "needs held-out rows"),
        (["seed=1,2", "search.objective=[eval_loss,loss]", "search.direction=[minimize]"], "1 directions for 2"),
        (["seed=1,2", "search.objective=[eval_loss,loss]", "search.pruner=asha"], "by one objective"),
        (["search=tpe", "seed=1,2", "search.pruner=asha"], "trainer.eval_strategy=steps"),
        (["seed=1,2", "search.n_jobs=0"], "search.n_jobs=0 must be at least 1"),
        (["seed=1,2", "search.retries=-1"], "search.retries=-1 must be at least 0"),
        (["seed=1,2", "search.trial_timeout=0"], "search.trial_timeout=0 must be at least 0.001"),
        (["seed=1,2", "search.resume=no/such"], "holds no sweep"),
        (["seed=1,2", "search.objective=eval_exact_match"], "type search.direction=maximize"),
        (["trainer=ppo", "search=tpe", "seed=1,2", "search.objective=[eval_objective/kl,eval_objective/scores]"],
         "type search.direction=[minimize,maximize]"),
        (["seed=1,2", "hydra.verbose=true"], "hydra.verbose=true has no effect in a sweep"),
        (["seed=1,2", "hydra.sweep.subdir=mine", "hydra.sweep.dir=there"], "hydra.sweep.subdir=mine has no effect"),
        (["seed=1,2", "hydra.job.env_set.PATH=here"], "may set only"),
        (["launch=one,fsdp2", "trainer.use_cpu=true"], "The trial launch=fsdp2 cannot be: launch.fsdp cannot run on a"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_first_trial(overrides, answer):
    assert answer in refusal(*overrides)


def test_a_trial_whose_processes_outnumber_its_devices_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    given = ["seed=1,2", "launch=ddp", "search.gpus_per_trial=2"]
    assert "type launch.processes=auto, or search.gpus_per_trial=3" in refusal(*given, "launch.processes=3")
    assert search.read([*given, "launch.processes=2"]).search.gpus_per_trial == 2
    assert search.read([*given, "launch.processes=3", "trainer.use_cpu=true"]).search.gpus_per_trial == 2


def test_what_a_config_sets_in_the_environment_its_trials_have(tmp_path):
    recipe = write_recipe(tmp_path, "hydra:\n  job:\n    env_set:\n      WANDB_MODE: offline\n")
    plan = search.read(
        ["experiment=article_sft,mine", "hydra.job.env_set.WANDB_PROJECT='a, b'"], **recipe, config_name="config"
    )
    assert [one.environment for one in plan.composed.values()] == [
        {"WANDB_PROJECT": "a, b"},
        {"WANDB_MODE": "offline", "WANDB_PROJECT": "a, b"},
    ]


def test_a_sweep_that_names_no_direction_is_the_one_that_minimizes():
    plans = [search.read(["seed=1,2", *more]) for more in ([], ["search.direction=minimize"])]
    assert plans[0].identity() == plans[1].identity()
    assert plans[0].directions == ["minimize"]


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "reward", "kto", "rloo", "orpo", "cpo", "ppo"])
def test_what_a_trainer_logs_can_be_an_objective(trainer):
    known = {
        "ppo": ["eval_objective/scores", "objective/kl", "val/explained_variance"],
        "grpo": ["reward", "rewards/exact_match/mean", "completions/mean_length", "eval_exact_match"],
        "rloo": ["eval_reward", "kl"],
        "sft": ["eval_loss", "loss", "mean_token_accuracy", "eval_exact_match", "train_loss"],
        "reward": ["eval_accuracy", "eval_margin"],
    }
    composed = compose.compose([f"trainer={trainer}"], check=False)
    for name in known.get(trainer, ["eval_rewards/margins", "rewards/chosen"]):
        assert search._objective_fault(name, composed) is None
    assert "nothing that" in search._objective_fault("eval_nosuch/metric", composed)


def test_a_recipe_cannot_say_where_a_sweep_goes_on(tmp_path):
    recipe = write_recipe(tmp_path, f"defaults:\n  - override /search: grid\nsearch:\n  resume: {tmp_path}\n")
    assert "type search.resume=" in refusal("experiment=mine", "seed=1,2", **recipe, config_name="config")


def test_search_without_m_is_refused(capsys):
    from runner.__main__ import prepare

    for overrides in (["search=tpe"], ["search.n_trials=3"]):
        with pytest.raises(ConfigError, match=r"-m"):
            prepare(overrides)


@pytest.mark.parametrize(
    "key", ["allow_code", "model.trust_remote_code", "hydra.run.dir", "output_dir", "search.resume"]
)
def test_a_recipe_may_sweep_but_not_what_only_a_person_may_type(key, tmp_path):
    recipe = write_recipe(tmp_path, "defaults:\n  - override /search: grid\nsearch:\n  params:\n    seed: 1,2\n")
    plan = search.read(["experiment=mine"], **recipe, config_name="config")
    assert plan.grid == [("1",), ("2",)]
    write_recipe(
        tmp_path, f"defaults:\n  - override /search: grid\nsearch:\n  params:\n    {key}: 'true,false'\n    seed: 1,2\n"
    )
    assert "is refused from a file" in refusal("experiment=mine", **recipe, config_name="config")


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "gp", "qmc"])
def test_a_sweep_that_begins_again_before_every_trial_tries_the_same(sampler, tmp_path):
    plan = search.read([f"search={sampler}", RATE, "peft.r=range(2,20,2)", "peft=lora,dora", "seed=int(interval(1,5))"])
    tried = []
    for again in (False, True):
        study, folder = None, tmp_path / str(again)
        folder.mkdir()
        for number in range(14):  # tpe is random for 10
            if study is None or again:
                study = journal.open_study(folder, {}, plan.directions, resumed=number > 0)
            assert journal.begin(study, plan) == number
            params = study.trials[number].params
            study.tell(number, abs(params["trainer.learning_rate"] - 0.01) + params["peft.r"])
            if again:
                with (folder / journal.JOURNAL).open("a") as file:
                    file.write('{"half a li')  # of a kill
                (folder / f"{journal.JOURNAL}.lock").symlink_to("nowhere")
        tried.append([trial.params for trial in study.trials])
    assert tried[0] == tried[1]
    assert len({str(params) for params in tried[0]}) == 14


def test_a_front_of_two_objectives_and_the_rank_of_all():
    def row(number, status, a, b):
        return Row(number, status, "", {}, {"a": a, "b": b}, 1, 1.0, None)

    # 0 and 1 are better than each other in one way; 0 is better than 2 in both
    rows = [
        row(0, "completed", 1, 1),
        row(1, "completed", 2, 5),
        row(2, "completed", 3, 0),
        row(3, "killed", None, None),
    ]
    assert [r.number for r in leaderboard.front(rows, ["a", "b"], ["minimize", "maximize"])] == [0, 1]
    assert [r.number for r in leaderboard.rank(rows, ["a", "b"], ["minimize", "maximize"])] == [0, 1, 2, 3]
    assert [r.number for r in leaderboard.front(rows, ["b"], ["maximize"])] == [1]


# ---- whole sweeps -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_is_the_run_that_it_would_be_alone_and_the_best_is_a_recipe(llama_dir, tmp_path, capsys):
    from test_run import start

    given = words(llama_dir)
    assert run(tmp_path / "sweep", *given, "trainer.learning_rate=1e-4,1e-2") == 0
    alone, _ = start(tmp_path, f"model.name_or_path={llama_dir}", "trainer.learning_rate=1e-2")
    configs = [yaml.safe_load((d / "config.yaml").read_text()) for d in (alone, tmp_path / "sweep" / "1")]
    assert {**configs[0], "output_dir": ""} == {**configs[1], "output_dir": ""}
    assert "search" not in manifest.read(tmp_path / "sweep" / "1")["choices"]
    records = [manifest.read(folder) for folder in (alone, tmp_path / "sweep" / "1")]
    assert records[0]["result_sha256"] == records[1]["result_sha256"]
    assert records[0]["metrics"]["eval_loss"] == float(board(tmp_path / "sweep")[1]["eval_loss"])

    recipes = tmp_path / "conf" / "experiment"
    recipes.mkdir(parents=True)
    (tmp_path / "sweep" / "best.yaml").rename(recipes / "best.yaml")
    best = compose.compose(["experiment=best"], config_dir=str(tmp_path / "conf")).config
    kept = {key: value for key, value in flat(best).items() if not key.startswith(("expect", "output_dir"))}
    assert kept == {key: value for key, value in flat(configs[1]).items() if not key.startswith(("expect", "output"))}
    said = capsys.readouterr().out
    assert "trainer.learning_rate=0.01" in said.split("best: trial 1\n")[1].splitlines()[0]
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["best"] == [1]


def sweep_apart(folder, overrides):
    """Run a sweep in a forked process, which has all imports and so forks its trials itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, launch.SIGNALS)  # which the server of ``commands`` blocks
    trials.warm = lambda modules, left_out: None
    trials._context = lambda: multiprocessing.get_context("fork")
    os._exit(run(folder, *overrides))


def begin_apart(folder, *overrides):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(trials.PRELOAD)
    process = context.Process(target=sweep_apart, args=(folder, overrides))
    process.start()
    return process


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_goes_on_ends_as_one_that_was_not(llama_dir, tmp_path):
    given = words(llama_dir, "search=tpe", "search.n_trials=3", RATE, "trainer.max_steps=6", "trainer.save_steps=1",
                  "trainer.save_strategy=steps", "samples.rows=0")  # fmt: skip
    began = time.monotonic()
    assert run(tmp_path / "whole", *given) == 0
    whole, chance = time.monotonic() - began, random.Random(0)
    folder, again = tmp_path / "killed", []
    for _ in range(KILLS):
        process = begin_apart(folder, *given, *again)
        process.join(chance.uniform(0.2, 0.6) * whole)
        process.kill()
        process.join()
        again = [f"search.resume={folder}"] if (folder / journal.JOURNAL).exists() else []
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/model/adapter_model.safetensors")}
    done = {path: when for path, when in done.items() if manifest.read(path.parents[1])["status"] == "completed"}
    assert run(folder, *given, *again) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    one, other = board(tmp_path / "whole"), board(folder)
    assert list(one) == list(other)
    for number, row in one.items():
        assert {**row, "seconds": 0} == {**other[number], "seconds": 0}
        digests = [manifest.read(path / str(number))["result_sha256"] for path in (tmp_path / "whole", folder)]
        assert digests[0] == digests[1]


@pytest.mark.slow
def test_an_interrupt_saves_what_runs_and_the_sweep_goes_on_from_there(llama_dir, tmp_path):
    given = words(llama_dir, "seed=1,2", "trainer.max_steps=300", "samples.rows=0", "trainer.eval_on_start=false")
    folder = tmp_path / "sweep"
    process = begin_apart(folder, *given)
    wait_until(lambda: len(lines(folder / "0") if (folder / "0" / "metrics.jsonl").exists() else []) > 3)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert board(folder)[0]["status"] == "preempted"
    assert list((folder / "0" / "checkpoints").glob("checkpoint-*/complete.json"))
    with pytest.raises(ConfigError, match=r"trainer.max_steps was 300 and is 6"):
        run(folder, *(w.replace("max_steps=300", "max_steps=6") for w in given), f"search.resume={folder}")
    with pytest.raises(ConfigError, match=r"seed was 1,2 and is 1,2,3"):
        run(folder, *given, "seed=1,2,3", f"search.resume={folder}")
    with pytest.raises(ConfigError, match=r"holds a sweep already"):
        run(folder, *given)
    lock = FileLock(folder / ".lock")
    with lock, pytest.raises(ConfigError, match=r"is in use"):
        run(folder, *given, f"search.resume={folder}")


def test_an_interrupt_as_the_first_trial_starts_ends_the_sweep_with_its_table(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time; time.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    code = f"""if True:
        import dataclasses, os, signal, sys, threading
        from pathlib import Path
        from runner import search, sweep, trials

        trials.PRELOAD[:] = ["slow"]
        plan = dataclasses.replace(search.read(["seed=1,2"]), trainers=[])
        folder = Path({str(tmp_path)!r}) / "sweep"

        def interrupt():
            while not (folder / "0").exists():
                pass
            threading.Event().wait(0.3)  # the server imports
            os.killpg(os.getpgid(0), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        sys.exit(sweep.run(plan, folder, ["seed=1,2"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, start_new_session=True
    )
    assert done.returncode == 130, done.stdout + done.stderr
    assert [row["status"] for row in board(tmp_path / "sweep").values()] == ["preempted"]
    assert "go on with: python -m runner -m seed=1,2 search.resume=" in done.stdout


@pytest.fixture
def one(tmp_path):
    """Return a sweep with a trial that leaves without a word whenever it is tried: its config is gone."""
    plan = search.read(["seed=1,2"])
    found = sweep.Sweep(plan, tmp_path, [])
    assert journal.begin(found.study, plan) == 0
    (tmp_path / "0").mkdir()
    manifest.create(tmp_path / "0", argv=[])
    manifest.update(tmp_path / "0", status="running")
    return found


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        ([], "6"),
        (["launch=ddp"], None),
        (["launch=ddp", "search.gpus_per_trial=1"], "6"),
        (["hydra/launcher=submitit_local"], None),
    ],
)
def test_trials_side_by_side_see_a_device_each(overrides, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(Trial, "start", lambda trial: None)
    plan = search.read(["seed=1,2", "search.n_jobs=2", *overrides])
    found = sweep.Sweep(plan, tmp_path, [])
    assert found.fill()
    assert [trial.job.environment.get("CUDA_VISIBLE_DEVICES") for trial in found.running] == [seen and "4", seen]


@pytest.mark.parametrize(("told", "status"), [(0, "killed"), (130, "preempted")])
def test_a_directory_that_stays_in_use_costs_its_trial_only(told, status, one, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "GRACE", 0.1)
    with manifest.claim(tmp_path / "0"):
        one.told = told
        one.start(0)
    (row,) = one.rows()
    assert (row.status, row.cause) == (status, "its directory is still in use by its last process")
    assert (one.running, one.free) == ([], [0])


def test_a_trial_that_is_tried_again_while_its_directory_stays_in_use_is_a_row(one, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "GRACE", 0.1)
    one.start(0)
    with manifest.claim(tmp_path / "0"):
        while one.running:
            one.look()
    assert [row.status for row in one.rows()] == ["killed"]
    assert one.free == [0]


def test_an_interrupt_while_a_trial_is_tried_again_reaches_it(one, monkeypatch):
    one.start(0)
    connect = forkserver.connect_to_new_process

    def interrupted(fds):
        one.handle(signal.SIGINT, None)
        return connect(fds)

    monkeypatch.setattr(forkserver, "connect_to_new_process", interrupted)
    while one.running:
        one.look()
    assert [row.status for row in one.rows()] == ["preempted"]
    assert one.close() == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_sweep_that_is_told_to_end_leaves_as_a_run_does(number, code, one):
    with launch.handling(dict.fromkeys(launch.SIGNALS, one.handle)):
        signal.raise_signal(number)
        assert one.close() == code
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(number)
    assert ended.value.code == code


@pytest.mark.slow
def test_a_second_interrupt_ends_all_at_once(llama_dir, tmp_path):
    given = words(llama_dir, "seed=1,2", "trainer.max_steps=3000", "samples.rows=0", "trainer.eval_on_start=false")
    process = begin_apart(tmp_path / "sweep", *given)
    wait_until(lambda: (tmp_path / "sweep" / "0" / "metrics.jsonl").exists())
    trial = manifest.read(tmp_path / "sweep" / "0")["process"]
    os.kill(trial, signal.SIGSTOP)  # it cannot heed the first
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    wait_until(lambda: manifest.is_dead(tmp_path / "sweep" / "0", manifest.read(tmp_path / "sweep" / "0")), 10)


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_pruned_and_keeps_its_metrics(llama_dir, tmp_path):
    given = words(
        llama_dir, *STEPPED, "trainer.learning_rate=3e-2,1e-5,1e-6", "search.pruner=asha", "search.objective=eval_loss"
    )
    assert run(tmp_path / "sweep", *given) == 0
    rows = board(tmp_path / "sweep")
    assert [rows[number]["status"] for number in range(3)] == ["completed", "pruned", "pruned"]
    assert [rows[number]["steps"] for number in range(3)] == ["4", "1", "1"]
    record = manifest.read(tmp_path / "sweep" / "1")
    assert record["status"] == "pruned"
    assert record["metrics"]["eval_loss"] == float(rows[1]["eval_loss"]) > float(rows[0]["eval_loss"])
    shutil.rmtree(tmp_path / "sweep" / "1" / "checkpoints", ignore_errors=True)
    train(tmp_path / "sweep" / "1")  # alone, after its sweep, nothing prunes it
    assert manifest.read(tmp_path / "sweep" / "1")["status"] == "completed"


@pytest.mark.slow
def test_an_objective_that_turns_out_not_to_be_logged_ends_the_sweep(llama_dir, tmp_path, capsys):
    given = words(llama_dir, "seed=1,2,3", "reward.terms={other: {function: length}}", "search.objective=eval_other")
    given = [word for word in given if "samples.rows" not in word]
    assert run(tmp_path / "sweep", *given, "samples.rows=0", "search.direction=maximize") == 2
    assert len(board(tmp_path / "sweep")) == 1
    said = capsys.readouterr().out
    assert "the run logs no eval_other" in said
    assert "eval_loss" in said
