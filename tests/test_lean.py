"""What a run cannot ask for is not imported; what it may ask for is there."""

import json
import os
import subprocess
import sys

import pytest

from runner import lean

NF4 = {"_target_": "transformers.BitsAndBytesConfig", "load_in_4bit": True}


def config(name_or_path="embedded:smollm135m", **other):
    return {"trainer": {}, "model": {"name_or_path": name_or_path}, "quantization": {}} | other


def said(program, **environment):
    """Return what a program says in a process of its own."""
    command = [sys.executable, "-c", "import importlib.util, sys\n" + program]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("asked", "needed"),
    [
        (config(), False),
        (config(trainer={"optim": "adamw_torch_fused"}), False),
        (config(quantization=NF4), True),
        (config(trainer={"optim": "paged_adamw_8bit"}), True),
        (config(trainer={"optim": "ademamix"}), True),
        (config(allow_code=["mine.reward"]), True),
        (config(model={"name_or_path": "embedded:smollm135m", "trust_remote_code": True}), True),
        (config("nobody/has-this-model"), True),
        (config("/there/is/no/such/folder"), True),
        (config(reward={"model": {"name_or_path": "nobody/has-this-model"}}), True),
        (config(reward={"model": None}), False),
    ],
)
def test_bitsandbytes_stays_wherever_a_config_may_ask_for_it(asked, needed):
    assert lean.may_quantize(asked) is needed


def test_a_model_that_comes_quantized_keeps_bitsandbytes(llama_dir, tmp_path):
    assert not lean.may_quantize(config(str(llama_dir)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {}}))
    assert lean.may_quantize(config(str(tmp_path)))


def test_a_process_for_several_runs_keeps_what_one_of_them_may_ask_for():
    assert lean.left_out(config(), config()) == "bitsandbytes"
    assert lean.left_out(config(), config(quantization=NF4)) == ""


@pytest.mark.slow
def test_what_is_left_out_is_not_there_for_the_libraries():
    begun = "from runner import lean\nlean.begin('bitsandbytes')\n"
    found = "from peft.import_utils import is_bnb_available as there\n"
    found += "print(there(), 'torch._inductor.compile_fx' in sys.modules)"
    assert said(begun + found) == "False False\n"


@pytest.mark.slow
def test_what_libraries_import_because_it_is_there_is_not_imported_but_is_there_afterwards():
    begun = "from runner import lean\nlean.begin('')\nimport runner.run\nprint(sys.modules['scipy'], end=' ')\n"
    assert said(begun + "lean.settle()\nimport scipy\nprint(scipy.__name__)") == "None scipy\n"


@pytest.mark.slow
def test_what_transformers_finds_in_itself_is_kept_and_found_again_when_it_is_damaged(tmp_path):
    watched = "from runner import lean\nlean.begin('')\nimport hashlib, transformers, transformers.models as models\n"
    watched += "print(hashlib.sha256(repr(sorted(dir(transformers) + dir(models))).encode()).hexdigest())"
    first = said(watched, RUNNER_CACHE=str(tmp_path))
    (kept,) = tmp_path.glob("transformers-*")
    before = kept.stat().st_ino
    assert said(watched, RUNNER_CACHE=str(tmp_path)) == first
    assert kept.stat().st_ino == before  # the same file: it was read, not made again
    kept.write_bytes(b"\0")
    assert said(watched, RUNNER_CACHE=str(tmp_path)) == first
    assert kept.stat().st_size > 1_000


def test_what_is_installed_is_kept_until_a_package_comes(tmp_path):
    def install(name):
        (about := site / f"{name}-1.dist-info").mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (about / "top_level.txt").write_text(f"{name}\n")

    def there():
        asked = "from runner import lean\nlean.begin('')\nimport importlib.metadata as installed\n"
        asked += "print(sorted({'one', 'two'} & set(installed.packages_distributions())))"
        places = os.pathsep.join([str(site), str(tmp_path / "work"), os.environ.get("PYTHONPATH", "")])
        return said(asked, RUNNER_CACHE=str(tmp_path / "cache"), PYTHONPATH=places)

    site = tmp_path / "site"
    install("one")
    assert there() == there() == "['one']\n"
    (tmp_path / "work" / "outputs").mkdir(parents=True)
    assert there() == "['one']\n"
    assert len(list((tmp_path / "cache").glob("packages-*"))) == 1  # a run's folder changes, and no package comes
    install("two")
    assert there() == "['one', 'two']\n"


def test_a_process_that_is_started_for_a_run_is_told_what_to_leave_out():
    found = "import runner\nprint(importlib.util.find_spec('bitsandbytes') is not None)"
    assert said(found, RUNNER_LEAVE_OUT="bitsandbytes") == "False\n"
    assert said(found, RUNNER_LEAVE_OUT="") == "True\n"
    assert said(found) == "True\n"


def test_a_process_that_has_the_libraries_keeps_them():
    lean.begin("bitsandbytes")
    assert sys.modules.get("bitsandbytes", "untouched") is not None
