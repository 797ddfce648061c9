import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from runner.callbacks import Guards, MetricsWriter, Progress, _fingerprint, duration
from runner.errors import RunStopped


class Line(torch.nn.Module):
    """loss = mean((a * x - y)^2) with one trainable number a; ``b`` is frozen."""

    def __init__(self, a=0.0, dtype=torch.float32):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([a], dtype=dtype))
        self.b = torch.nn.Parameter(torch.tensor([9.0]), requires_grad=False)

    def forward(self, x, labels):
        return {"loss": (self.a * x - labels).float().pow(2).mean()}


def trainer_for(model, folder, callbacks, *, x=1.0, y=1.0, **options):
    fixed = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}
    options = {"max_steps": 3, **fixed, **plain, **options}
    rows = [{"x": torch.tensor([x]), "labels": torch.tensor([y])}] * 8
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, logging_nan_inf_filter=False, **options
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_log_is_a_line_with_step_and_time(tmp_path):
    # loss = (a - 1)^2 from a = 0 with learning rate 0.25: gradient 2(a - 1), so a - 1 halves with every step.
    trainer_for(Line(), tmp_path, [MetricsWriter(tmp_path)], learning_rate=0.25).train()
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert [line["loss"] for line in lines[:3]] == [1.0, 0.25, 0.0625]
    assert [line["grad_norm"] for line in lines[:3]] == [2.0, 1.0, 0.5]
    assert all(line["learning_rate"] == 0.25 and line["epoch"] == line["step"] / 8 for line in lines[:3])
    assert lines[0]["seconds"] <= lines[-1]["seconds"]
    assert "train_runtime" in lines[-1]


def test_what_is_no_number_is_null_in_valid_json(tmp_path):
    trainer = trainer_for(Line(), tmp_path, [MetricsWriter(tmp_path)])
    trainer.log({"a": float("nan"), "b": torch.tensor(float("inf")), "c": torch.tensor(2), "d": None, "e": "x"})
    (line,) = metrics_of(tmp_path)
    assert {name: line[name] for name in "abcde"} == {"a": None, "b": None, "c": 2, "d": None, "e": "x"}


def test_a_model_with_nothing_to_train_is_refused_before_training(tmp_path):
    model = Line()
    model.a.requires_grad = False
    with pytest.raises(RunStopped, match="none of its parameters requires a gradient"):
        trainer_for(model, tmp_path, [Guards()])


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    model = Line()
    with pytest.raises(RunStopped, match=r"the gradient of step 1 is not finite, in 1 parameters, first a\."):
        trainer_for(model, tmp_path, [Guards()], y=float("inf"), logging_steps=100).train()
    assert model.a.item() == 0.0


def test_a_loss_that_stops_being_finite_later_stops_the_run(tmp_path):
    # With learning rate 9 a step multiplies a - 1 by 1 - 2 * 9 = -17 and the loss by 289; 289^15 = 8e36 fits into
    # float32, 289^16 does not.
    trainer = trainer_for(Line(), tmp_path, [Guards(first_steps=1)], learning_rate=9.0, max_steps=40)
    with pytest.raises(RunStopped, match=r"loss is inf at step 17, .*trainer\.learning_rate \(now 9\.0\)"):
        trainer.train()


def test_weights_that_a_step_is_too_small_to_move_stop_the_run(tmp_path):
    # bfloat16 has 8 bits: next below 1 is 1 - 1/256, and a step of 0.5 * 1e-6 rounds away.
    model = Line(a=1.0, dtype=torch.bfloat16)
    with pytest.raises(RunStopped, match=r"step 1 did not move a single weight.*learning rate is 1e-06"):
        trainer_for(model, tmp_path, [Guards()], y=0.0, learning_rate=1e-6).train()


def test_a_step_without_a_learning_rate_is_no_fault(tmp_path):
    model = Line()
    guards = Guards()
    trainer_for(
        model, tmp_path, [guards], learning_rate=0.5, lr_scheduler_type="constant_with_warmup", warmup_steps=2
    ).train()
    assert guards.moved
    assert guards.still == 0


def test_a_zero_gradient_is_borne_for_some_steps_and_then_stops_the_run(tmp_path, caplog):
    # loss = (a * 0 - 1)^2 does not depend on a.
    trainer_for(Line(), tmp_path, [Guards(patience=4)], x=0.0, max_steps=3).train()
    assert "step 1 did not move the weights: the gradient is zero" in caplog.text
    assert "the result is the model that the run began with" in caplog.text
    with pytest.raises(RunStopped, match="the first 4 steps did not move a single weight"):
        trainer_for(Line(), tmp_path, [Guards(patience=4)], x=0.0, max_steps=5).train()


def test_one_step_that_moves_ends_the_watch(tmp_path):
    guards = Guards(patience=2)
    trainer = trainer_for(Line(), tmp_path, [guards], max_steps=6, y=1.0, learning_rate=0.5)
    # (a - 1)^2 with learning rate 0.5 is at its minimum after one step: every later gradient is zero.
    trainer.train()
    assert trainer.model.a.item() == 1.0
    assert guards.still == 0


def test_an_adapter_that_starts_at_zero_counts_as_moving(tmp_path, llama_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_dir), LoraConfig(target_modules=["q_proj"]))
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    trainer = trainer_for(model, tmp_path, [Guards()], max_steps=1, optim="adamw_torch", learning_rate=1e-4)
    trainer.train_dataset = rows
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_B" in name for name in moved)  # B is zero, so A has no gradient yet


def test_progress_is_a_plain_line_for_every_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="runner")
    trainer = trainer_for(Line(), tmp_path, [Progress()], learning_rate=0.25, max_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.log({"eval_exact_match": 0.5})
    lines = [record.getMessage() for record in caplog.records if record.name == "runner.callbacks"]
    assert lines[0].startswith("step 1/2  loss 1  grad_norm 2  learning_rate 0.25  (0 s, 0 s left)")
    assert lines[1] == "step 2/2  loss 0.25  grad_norm 1  learning_rate 0.25"
    assert lines[2] == "trained 2 steps in 0 s"
    assert lines[3] == "step 2, held out: eval_loss 0.0625"  # after two steps a = 0.75
    assert lines[4] == "step 2, held out: eval_exact_match 0.5"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


def test_overflows_in_float16_are_borne_while_the_loss_scale_falls():
    model = Line()
    model.a.grad = torch.tensor([float("inf")])
    half = SimpleNamespace(fp16=True, bf16=False, learning_rate=1.0, max_grad_norm=1.0)
    state = SimpleNamespace(global_step=0)
    guards = Guards(patience=2)
    guards.on_step_begin(half, state, None, model=model)
    for _ in range(2):
        guards.on_pre_optimizer_step(half, state, None, model=model)
        skipped = SimpleNamespace(step_was_skipped=True, param_groups=[{"lr": 1.0}])
        guards.on_optimizer_step(half, state, None, model=model, optimizer=skipped)
    assert guards.still == 0  # a skipped step says nothing about the weights
    with pytest.raises(RunStopped, match=r"not finite, in 1 parameters, first a\. .*a wider type than float16"):
        guards.on_pre_optimizer_step(half, state, None, model=model)


def test_the_least_movement_of_any_weight_shows():
    still = torch.nn.Linear(1000, 1000, bias=False).requires_grad_(True)
    torch.nn.init.ones_(still.weight)
    first = _fingerprint(still)
    assert torch.equal(first, _fingerprint(still))
    with torch.no_grad():
        still.weight[7, 7] += 2.0**-23  # one in a million, by the smallest step of float32
    second = _fingerprint(still)
    assert not torch.equal(first, second)
    with torch.no_grad():
        still.weight[0, 0] += 0.5
        still.weight[0, 1] -= 0.5  # the sum stays
    assert not torch.equal(second, _fingerprint(still))
