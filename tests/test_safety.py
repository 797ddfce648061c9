import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_compose import refusal, write_recipe
from test_run import extras, start

from runner import checkpoints, compose, manifest, models
from runner.config import CONF, build
from runner.errors import ConfigError
from runner.run import run

HOSTILE = {
    "a target in a group that has none": "model: {_target_: os.system}",
    "a target deep in a group": "trainer: {lr_scheduler_kwargs: {_target_: os.system, command: touch x}}",
    "a target in a list": "reward: {terms: {a: [{_target_: os.system}]}}",
    "a partial": "peft: {_partial_: true}",
    "positional arguments": "peft: {_args_: [x]}",
    "a trainer target that is no config": "trainer: {_target_: subprocess.Popen}",
    "a trainer target that climbs": "trainer: {_target_: trl.os.system}",
    "a trl class that is no trainer's": "trainer: {_target_: trl.ModelConfig}",
    "a target that is interpolated": "trainer: {_target_: 'trl.${x}'}\nx: SFTConfig",
    "a callback": "hydra: {callbacks: {a: {_target_: asyncio.create_subprocess_shell}}}",
    "a launcher of its own": "hydra: {launcher: {_target_: os.system}}",
    "a sweeper of its own": "hydra: {sweeper: {_target_: os.system}}",
    "a logging handler": "hydra: {job_logging: {handlers: {file: {class: os.system}}}}",
    "a logging factory": "hydra: {job_logging: {handlers: {file: {'()': os.system}}}}",
    "a log file elsewhere": "hydra: {job_logging: {handlers: {file: {filename: /tmp/x}}}}",
    "an environment variable set": "hydra: {job: {env_set: {PATH: /tmp}}}",
    "a secret read": "output_dir: 'outputs/${oc.env:HF_TOKEN}'",
    "an unknown resolver": "output_dir: '${oc.create:x}'",
    "a secret in place of what is not set": "trainer: {run_name: '${oc.env:SCRATCH,${oc.env:DATABASE_URL}}'}",
    "an unknown resolver in an argument": "trainer: {run_name: '${oc.env:SCRATCH,${oc.decode:x}}'}",
    "logging by interpolation": "trainer: {gradient_checkpointing_kwargs: {'()': os._exit, status: 7}}\n"
    "hydra: {job_logging: {handlers: {file: '${trainer.gradient_checkpointing_kwargs}'}}}",
    "environment by interpolation": "dataset: {rename: {PATH: /tmp}}\nhydra: {job: {env_set: '${dataset.rename}'}}",
    "a resolver by interpolation": "model: {revision: env}\noutput_dir: 'outputs/${oc.${model.revision}:HF_TOKEN}'",
    "a sweep of its own": "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}",
    "a launcher with shell lines": "hydra: {launcher: {_target_: hydra_plugins.hydra_submitit_launcher.a.Slurm}}",
    "trials on a cluster": "defaults: [{override /hydra/launcher: ray}]",
    "an alias": "x: &x {_target_: os.system}\nmodel: *x",
    "a merged key": "x: &x {_target_: os.system}\nmodel: {<<: *x}",
    "an attribute chain": "trainer: {_target_: runner.__main__.os.system}",
    "an attribute chain through a library": "trainer: {_target_: transformers.utils.import_utils.os.system}",
    "a method": "trainer: {_target_: trl.SFTConfig.from_dict}",
    "a builtin": "trainer: {_target_: builtins.eval}",
    "a process": "trainer: {_target_: subprocess.Popen}",
    "an adapter that is a function": "peft: {_target_: peft.get_peft_model}",
    "an adapter that is no config": "peft: {_target_: transformers.TrainingArguments}",
    "a quantization that is code": "quantization: {_target_: builtins.exec}",
    "a target of the run": "_target_: os.system",
    "a target of the samples": "samples: {_target_: os.system}",
    "a target of an experiment's own group": "mine: {_target_: os.system}",
    "a target that is a list": "trainer: {_target_: [os.system]}",
    "a YAML tag": "seed: !!python/object/apply:os.system [touch canary]",
    "a YAML tag of a module": "seed: !!python/module:os",
    "a help template": "hydra: {help: {template: '${oc.env:HF_TOKEN}'}}",
    "a callback as a list": "hydra: {callbacks: [{_target_: os.system}]}",
    "remote code of the trainer's model": "trainer: {model_init_kwargs: {trust_remote_code: true}}",
    "remote code of a reward model": "reward: {model: {name_or_path: x, trust_remote_code: true}}",
    "kernels of the hub": "trainer: {model_init_kwargs: {allow_all_kernels: true}}",
    "a generation of its own": "trainer: {generation_kwargs: {custom_generate: a/b}}",
    "a module beside an adapter": "peft: {auto_mapping: {parent_library: os, base_model_class: x}}",
    "pickled weights": "model: {allow_pickle: true}",
    "a directory above": "output_dir: ../elsewhere",
    "a directory above, late": "output_dir: outputs/../../elsewhere",
    "a directory of the machine": "output_dir: /tmp/elsewhere",
    "a directory by interpolation": "model: {revision: ../..}\noutput_dir: 'outputs/${model.revision}/x'",
    "a directory beside": "output_dir: runner",
    "Hydra's own directory": "hydra: {run: {dir: /tmp/elsewhere}}",
    "a sweep's directory": "hydra: {sweep: {dir: ../elsewhere}}",
    "a sweep's names": "hydra: {sweep: {subdir: ../../x}}",
    "the log's name": "hydra: {job: {name: ../../x}}",
    "another working directory": "hydra: {job: {chdir: true}}",
    "trackers elsewhere": "hydra: {job: {env_set: {TENSORBOARD_LOGGING_DIR: /tmp}}}",
    "options from elsewhere": "hydra: {searchpath: ['pkg://antigravity']}",
    "remote code": "model: {trust_remote_code: true}",
    "code of its own": "allow_code: [os.system]",
}


def files_under(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_and_has_no_effect(name, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DATABASE_URL", "here")
    recipe, imported = write_recipe(tmp_path, HOSTILE[name]), set(sys.modules)
    before = files_under(tmp_path, CONF)
    assert refusal("experiment=mine", **recipe)
    assert files_under(tmp_path, CONF) == before
    assert not {"antigravity", "torch"} & (set(sys.modules) - imported)


def test_a_person_may_type_what_a_recipe_may_not():
    assert compose.compose(["model.trust_remote_code=true"]).config["model"]["trust_remote_code"] is True


@pytest.mark.parametrize(
    "lines",
    [
        "setup: [touch canary]",
        "additional_parameters: {mail-user: me}",
        "submitit_folder: ../elsewhere",
        'comment: "x\\n#SBATCH --uid=0"',
    ],
)
def test_a_recipe_tells_a_scheduler_nothing_that_runs(lines, tmp_path):
    assert "refused" in refusal(
        "experiment=mine",
        "hydra/launcher=submitit_slurm",
        **write_recipe(tmp_path, f"hydra: {{launcher: {{{lines}}}}}"),
    )
    assert compose.compose(["hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]"])


def test_at_least_forty_hostile_recipes_are_tried():
    assert len(HOSTILE) >= 40


def test_nested_targets_are_data_whatever_was_checked_before(tmp_path):
    call = {"_target_": "pathlib.Path.touch", "_args_": [str(tmp_path / "canary")]}
    build({"_target_": "trl.SFTConfig", "output_dir": str(tmp_path), "use_cpu": True, "lr_scheduler_kwargs": call})
    assert not (tmp_path / "canary").exists()


# ---- files of a stranger --------------------------------------------------------------------------------------------


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.fixture
def stranger(llama_dir, tmp_path):
    """A copy of a model folder, to be tampered with."""
    return Path(shutil.copytree(llama_dir, tmp_path / "stranger"))


def test_pickled_weights_are_read_only_where_that_was_typed_and_never_run(stranger, tmp_path):
    torch.save(load_file(stranger / "model.safetensors"), stranger / "pytorch_model.bin")
    (stranger / "model.safetensors").unlink()
    tokenizer = models.load_tokenizer(str(stranger))
    with pytest.raises(ConfigError, match=r"type model\.allow_pickle=true"):
        models.load_policy(str(stranger), tokenizer=tokenizer)
    assert models.load_policy(str(stranger), tokenizer=tokenizer, allow_pickle=True)
    torch.save({"lm_head.weight": Bomb(tmp_path / "canary")}, stranger / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl"):
        models.load_policy(str(stranger), tokenizer=tokenizer, allow_pickle=True)
    assert not (tmp_path / "canary").exists()


def test_a_models_own_code_is_not_imported(stranger, tmp_path):
    (stranger / "modeling_own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((stranger / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
    }
    (stranger / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="trust_remote_code=true"):
        models.load_policy(str(stranger), tokenizer=models.load_tokenizer(str(stranger)))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
        "{{ messages.__class__.clear(messages) }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template, stranger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (stranger / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="template"):
        models.load_tokenizer(str(stranger))
    assert not (tmp_path / "canary").exists()


def test_a_dataset_folder_with_a_script_is_not_run(tmp_path):
    from runner import data

    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(ConfigError):
        data.load_splits(reads="sft", run_seed=1, path=str(folder))
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert len(data.load_splits(reads="sft", run_seed=1, path=str(folder)).train) == 1
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", checkpoints.STATE, "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_of_a_stranger_runs_no_code(name, llama_dir, tmp_path):
    run_dir, _ = start(
        tmp_path,
        f"model.name_or_path={llama_dir}",
        "trainer.save_strategy=steps",
        "trainer.save_steps=1",
        *extras("sft"),
    )
    folder = run_dir / "checkpoints" / "checkpoint-1"
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint-2")
    torch.save({"a": Bomb(tmp_path / "canary")}, folder / name)
    checkpoints.seal(
        folder, {log: (run_dir / log).stat().st_size for log in checkpoints.LOGS if (run_dir / log).exists()}
    )
    manifest.update(run_dir, status="failed")
    if name == "training_args.bin":  # nobody reads it
        run(run_dir)
    else:
        with pytest.raises(ConfigError, match="could run code"):
            run(run_dir)
    assert not (tmp_path / "canary").exists()
