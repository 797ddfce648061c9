import pytest
from test_compose import refusal, write_recipe

from runner import compose

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
    "logging by interpolation": "trainer: {gradient_checkpointing_kwargs: {'()': os._exit, status: 7}}\n"
    "hydra: {job_logging: {handlers: {file: '${trainer.gradient_checkpointing_kwargs}'}}}",
    "environment by interpolation": "dataset: {rename: {PATH: /tmp}}\nhydra: {job: {env_set: '${dataset.rename}'}}",
    "a resolver by interpolation": "model: {revision: env}\noutput_dir: 'outputs/${oc.${model.revision}:HF_TOKEN}'",
    "a sweep of its own": "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}",
    "a launcher with shell lines": "hydra: {launcher: {_target_: hydra_plugins.hydra_submitit_launcher.a.Slurm}}",
    "remote code": "model: {trust_remote_code: true}",
    "code of its own": "allow_code: [os.system]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused(name, tmp_path):
    assert "refused" in refusal("experiment=mine", **write_recipe(tmp_path, HOSTILE[name]))


def test_a_person_may_type_what_a_recipe_may_not():
    assert compose.compose(["model.trust_remote_code=true"]).config["model"]["trust_remote_code"] is True
