"""Reference log-probabilities that are kept are those that would be computed, and nobody computes them twice."""

import logging
from types import SimpleNamespace

import pytest
from test_run import losses, start
from tiny import save_tiny

from runner import manifest, reference, replay, trainers
from runner.journal import JOURNAL

pytestmark = pytest.mark.slow
TWO_EPOCHS = ["trainer.num_train_epochs=2", "trainer.max_steps=-1", "trainer.learning_rate=1e-2"]


def test_it_pays_from_the_second_epoch_on_and_in_a_sweep_before(tmp_path):
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "world_size": 1, "max_steps": -1}
    shape |= {"sync_ref_model": False, "fsdp": None, "deepspeed": None, "num_train_epochs": 1, reference.FIELD: False}

    def pays(one_disk=True, **other):
        arguments = SimpleNamespace(**shape | other)
        (chosen,) = reference.choose(arguments, {}, rows=80, run_dir=tmp_path / "1", one_disk=one_disk).values()
        assert arguments.precompute_ref_log_probs is chosen
        return chosen

    typed = {reference.FIELD: False}
    assert reference.choose(SimpleNamespace(**shape), typed, rows=1, run_dir=tmp_path, one_disk=True) == {}
    assert not pays()
    assert pays(num_train_epochs=1.5)
    assert not pays(num_train_epochs=2, sync_ref_model=True)
    assert not pays(num_train_epochs=2, one_disk=False)
    assert not pays(max_steps=10)  # of 8 rows each
    assert pays(max_steps=11)
    (tmp_path / JOURNAL).touch()
    assert pays()
    assert not pays(max_steps=5)


@pytest.mark.parametrize(
    ("launch", "knows"), [({"nodes": 1}, True), ({"nodes": 2}, False), ({"fsdp": {"a": 1}}, False)]
)
def test_a_plan_for_several_processes_knows_whether_they_will_compute_in_advance(launch, knows, tmp_path):
    node = {"_target_": "trl.DPOConfig", "num_train_epochs": 2, "use_cpu": True}
    planned = {"evaluates": True, "planned": 2, "rows": 80, "launch": launch}
    arguments, chosen = trainers.build_arguments(node, tmp_path, **planned)
    assert (arguments.world_size, arguments.precompute_ref_log_probs, chosen[reference.FIELD]) == (2, knows, knows)


@pytest.mark.parametrize(
    ("trainer", "peft", "rows", "weights"), [("dpo", "lora", 16, 1), ("dpo", "none", 16, 2), ("kto", "lora", 32, 3)]
)
def test_losses_stay_and_the_next_run_reads_what_the_first_computed(trainer, peft, rows, weights, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = save_tiny(tmp_path / "model", seed=weights)
    base = [f"trainer={trainer}", f"peft={peft}", f"model.name_or_path={folder}", *TWO_EPOCHS]
    never, _ = start(tmp_path, *base, "trainer.precompute_ref_log_probs=false", name="never")
    assert "Reference log-probabilities" not in caplog.text
    first, _ = start(tmp_path, *base, name="first")
    assert manifest.read(first)["chosen"][reference.FIELD] is True
    assert f"Reference log-probabilities of {rows} rows computed" in caplog.text
    assert losses(first) == pytest.approx(losses(never), abs=1e-5)
    caplog.clear()
    other = ["trainer.beta=0.3", "seed=7", *(["peft.r=4"] if peft == "lora" else [])]
    start(tmp_path, *base, *other, name="second")
    assert "computed" not in caplog.text
    assert caplog.text.count("rows kept") == 2  # to train on, and held out


def test_another_reference_or_limit_has_others(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for seed, limit in ((4, 256), (5, 256), (5, 200)):
        folder = save_tiny(tmp_path / f"model{seed}", seed=seed)
        options = [f"model.name_or_path={folder}", f"trainer.max_length={limit}", "trainer=dpo", *TWO_EPOCHS]
        start(tmp_path, *options, name=f"{seed}-{limit}")
    assert caplog.text.count("Reference log-probabilities of 16 rows computed") == 3


def test_a_replay_does_as_the_run_did(llama_dir, tmp_path):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / JOURNAL).touch()  # a trial's run, that is repeated elsewhere
    run_dir, _ = start(sweep, "trainer=dpo", f"model.name_or_path={llama_dir}", "trainer.max_steps=3", name="0")
    assert replay.replay(run_dir, tmp_path / "again") is None
    assert manifest.read(tmp_path / "again")["chosen"][reference.FIELD] is True
