import copy
import json
import math
from pathlib import Path

import pytest
import torch
from commands import run_ranks
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from runner import actor_critic, sampling
from runner.actor_critic import Sequences
from runner.errors import ConfigError
from runner.ppo import PPOConfig, PPOTrainer

pytestmark = pytest.mark.slow
MODES = [("adapter", True), ("shared", True), ("separate", True), ("shared", False), ("separate", False)]
CLOCKED = ("time/", "train_runtime", "train_samples", "train_steps", "eval_runtime", "eval_samples", "eval_steps")


def variety(completions, **kwargs):
    return [1 + len(set(text)) / 4 for text in completions]


def prompts(count=16):
    return Dataset.from_dict({"prompt": [f"number {i}" + " and more" * (i % 5) for i in range(count)]})


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)


def build(folder, *, kind="llama", peft=True, model=None, train=None, tokenizer=None, **options):
    """A trainer of a tiny model: rollouts of 8 in two mini-batches of 2 x 2, two passes, so four steps a rollout."""
    parts = {key: options.pop(key) for key in list(options) if key not in PPOConfig.__dataclass_fields__}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "max_steps": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    tokenizer = tokenizer or tiny_tokenizer()
    return PPOTrainer(
        model=tiny_model(kind, tokenizer) if model is None else model,
        args=PPOConfig(**settings | options),
        train_dataset=prompts() if train is None else train,
        processing_class=tokenizer,
        peft_config=lora() if peft is True else peft or None,
        **{"reward_funcs": variety} | parts,
    )


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def history(trainer):
    """All that was logged, but for what a clock says."""
    return [
        {key: value for key, value in line.items() if not key.startswith(CLOCKED)} for line in trainer.state.log_history
    ]


def step_of(trainer, index=0):
    """Take the gradient of a whole rollout in one optimizer step, without the step."""
    rollout, _ = trainer.maker.make(index, trainer.train_dataset, trainer.state)
    trainer.model.train()
    rows = list(range(trainer.args.rollout_rows))
    trainer._accumulate(rollout, rows, rows)
    return rollout, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


# ---- what trains, and what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize(("mode", "peft"), MODES)
def test_each_value_mode_moves_what_it_trains_and_nothing_else(tmp_path, kind, mode, peft):
    trainer = build(tmp_path, kind=kind, peft=peft, value_mode=mode)
    before = weights(trainer)
    trainer.train()
    changed = moved(before, weights(trainer))
    assert trainer.state.global_step == 4
    assert all(math.isfinite(value) for line in history(trainer) for value in line.values())
    own = {name for name in before if "lora_" in name and ".default." in name}
    value = {name for name in before if name.startswith(("value_", "value_model")) or ".ppo_value." in name}
    assert value & changed
    if peft:
        assert {name for name in changed if name.startswith("policy.")} <= own | value
        assert own <= changed
    else:
        assert any("mlp" in name for name in changed if name.startswith("policy."))
    assert (mode == "adapter") == any(".ppo_value." in name for name in before)
    assert any(name.endswith(("value_head.weight", "score.weight")) for name in changed)


@pytest.mark.parametrize("peft", [True, False])
def test_an_adapter_has_its_gradients_before_the_first_backward_pass(tmp_path, peft):
    model = build(tmp_path, peft=peft).model
    model.prepare_gradients("policy")
    assert all((parameter.grad is not None) == peft for parameter in model.policy_parameters)
    assert all(parameter.grad is None for parameter in model.value_parameters)
    model.policy_parameters[0].grad = kept = torch.ones_like(model.policy_parameters[0])
    model.prepare_gradients("policy")
    assert model.policy_parameters[0].grad is kept  # what was accumulated stays


def test_the_reference_is_the_start_and_stays_it(tmp_path):
    for peft, ref in ((True, "base"), (False, torch.nn.Module)):
        trainer = build(tmp_path, peft=peft)
        reference = trainer.model.reference
        assert reference == ref or isinstance(reference, ref)
        batch, mask = Sequences([[5, 6, 7, 8, 9]], [2]), torch.ones(1, 3, dtype=torch.bool)

        def read(role, trainer=trainer, batch=batch, mask=mask):
            with torch.no_grad(), trainer.model.role(role) as player:
                return trainer.model.read(player, batch, mask).logps

        start = read("policy")
        trainer.train()
        assert torch.equal(read("reference"), start)
        assert not torch.allclose(read("policy"), start)


def test_without_a_kl_no_reference_is_made(tmp_path):
    assert build(tmp_path, peft=False, kl_coef=0.0).model.reference is None
    trainer = build(tmp_path, kl_coef=0.0)
    trainer.train()
    assert "time/reference" not in trainer.state.log_history[0]


def test_a_model_that_comes_with_an_adapter_is_its_own_reference(tmp_path):
    model = get_peft_model(tiny_model("llama", tiny_tokenizer()), lora(init_lora_weights=False))
    trainer = build(tmp_path, model=model, peft=False, max_steps=5)
    trainer.train()
    log = trainer.state.log_history
    assert trainer.model.value_mode == "adapter"
    assert log[0]["objective/kl"] == 0
    assert log[4]["objective/kl"] != 0
    assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if ".ppo_reference." in n)


def test_an_initialisation_that_changes_the_base_still_has_the_start_as_reference(tmp_path):
    trainer = build(tmp_path, peft=lora(init_lora_weights="olora"), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)


def test_the_value_head_starts_at_zero_in_every_mode(tmp_path):
    for mode, peft in MODES:
        trainer = build(tmp_path, peft=peft, value_mode=mode)
        assert all(not p.any() for p in trainer.model.score.parameters())
        trainer.train()
        assert trainer.state.log_history[0]["val/values_mean"] == 0


def test_the_first_pass_over_the_first_rollout_has_no_kl_and_a_ratio_of_one(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["objective/kl"] == 0
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/clipfrac_avg"] == 0


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "peft"), MODES)
def test_gradients_are_the_same_with_gradient_checkpointing(tmp_path, mode, peft):
    found = []
    for checkpointing in (False, True):
        trainer = build(tmp_path, peft=peft, value_mode=mode, entropy_coef=0.01, kl_loss_coef=0.1)
        with torch.no_grad():  # away from the start, so that no gradient is zero
            for parameter in trainer.model.policy_parameters + trainer.model.value_parameters:
                parameter.add_(0.01)
        if checkpointing:
            trainer.model.activation_checkpointing_enable()
        found.append(step_of(trainer)[1])
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert all(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_the_second_adapter_leaves_the_policys_gradient_as_it_is(tmp_path):
    gradients = [step_of(build(tmp_path, value_mode=mode))[1] for mode in ("adapter", "separate")]
    alike = [name for name in gradients[0] if ".default." in name]
    assert alike
    assert any(gradients[0][name].any() for name in alike)
    for name in alike:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_the_gradient_is_that_of_the_formula(tmp_path):
    trainer = build(tmp_path, vf_coef=0.5)
    rollout, gradients = step_of(trainer)
    logits = []
    for ids, start in zip(rollout.ids, rollout.prompt_lengths, strict=True):  # one by one, nothing padded
        with trainer.model.role("policy") as player:
            table = player(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        logits.append(table.gather(1, torch.tensor(ids[start:])[:, None]).squeeze(1))
    new = torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)
    loss = (
        -(rollout.advantages * (new - rollout.old_logps).exp() * rollout.policy_mask).sum() / rollout.policy_mask.sum()
    )
    names = [name for name, _ in trainer.model.named_parameters() if ".default." in name]
    expected = torch.autograd.grad(loss, [dict(trainer.model.named_parameters())[name] for name in names])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum-norm"])
def test_how_a_mini_batch_is_split_changes_nothing(tmp_path, aggregation):
    found = []
    for micro in (8, 4, 2, 1):
        trainer = build(
            tmp_path,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
            num_mini_batches=1,
            loss_agg=aggregation,
            optim="sgd",
            learning_rate=1.0,
        )
        trainer.train()
        found.append((weights(trainer), trainer.state.log_history[0]["loss"]))
    for state, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=1e-6)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, found[0][0][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["adapter", "shared", "separate"])
def test_the_first_pass_uses_the_rollouts_own_forward_pass(tmp_path, mode):
    # whole rollouts in one backward pass (8 x 1) against the same in two (4 x 2), which reads anew
    found = {}
    for micro in (8, 4):
        trainer = build(
            tmp_path,
            value_mode=mode,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
            num_mini_batches=1,
            entropy_coef=0.01,
            reward_position="after_eos",
            gradient_checkpointing=micro == 8,
            optim="sgd",
            learning_rate=1.0,
            max_steps=2,
        )
        reads, read = [], trainer.model.read

        def counted(player, batch, *args, read=read, reads=reads, **kwargs):
            reads.extend(batch.ids)
            return read(player, batch, *args, **kwargs)

        trainer.model.__dict__["read"] = counted
        trainer.train()
        found[micro] = (weights(trainer), len(reads), trainer.state.log_history[0]["val/ratio"])
    assert found[8][1:] == (3 * 8, 1.0)  # by the reference, by the policy, and in the second pass
    assert found[4][1] == 4 * 8
    for name, tensor in found[8][0].items():
        torch.testing.assert_close(tensor, found[4][0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_policy_and_value_function_are_clipped_apart(tmp_path):
    trainer = build(tmp_path, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0, value_learning_rate=2.0, max_steps=1)
    before = weights(trainer)
    trainer.train()
    steps = {"default": 0.0, "value": 0.0}
    for name, tensor in weights(trainer).items():
        steps["value" if "value" in name else "default"] += float((tensor - before[name]).square().sum())
    assert math.sqrt(steps["default"]) == pytest.approx(1e-3, rel=1e-2)
    assert math.sqrt(steps["value"]) == pytest.approx(2e-3, rel=1e-2)
    assert {"grad_norm/policy", "grad_norm/value"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("mode", ["adapter", "shared", "separate"])
def test_warming_the_value_function_up_leaves_the_policy_alone(tmp_path, mode):
    trainer = build(tmp_path, value_mode=mode, critic_warmup_rollouts=1)
    before = weights(trainer)
    trainer.train()
    changed = moved(before, weights(trainer))
    assert changed
    assert not any(".default." in name for name in changed)
    trainer = build(tmp_path, value_mode=mode, critic_warmup_rollouts=1, max_steps=5)
    trainer.train()
    assert any(".default." in name for name in moved(before, weights(trainer)))


# ---- reading ------------------------------------------------------------------------------------------------------


def plain_read(model, batch, temperature):
    """Log-probabilities and entropies of each sequence alone, by the model's own forward."""
    found = []
    for ids, start in zip(*batch, strict=True):
        logps = (model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float() / temperature).log_softmax(-1)
        found.append((logps.gather(1, torch.tensor(ids[start:])[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)))
    return found


def soft_capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5},
        )
    ).eval()


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
@pytest.mark.parametrize("kind", ["llama", "neox", "softcap"])
def test_reading_a_batch_is_reading_its_sequences_alone(tmp_path, monkeypatch, kind, parts):
    if parts:
        monkeypatch.setattr(actor_critic, "HEAD_CELLS", 600)  # two tokens of a 300-token vocabulary
    model = soft_capped() if kind == "softcap" else tiny_model(kind, tiny_tokenizer())
    subject = build(tmp_path, peft=False, model=model, value_mode="shared", kl_coef=0.0).model
    batch = Sequences([[7, 8, 9, 10, 11, 12], [5, 6, 7], [20, 21, 22, 23]], [2, 2, 1])
    mask = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    torch.nn.init.normal_(subject.value_head.weight)
    found = subject.read(model, batch, mask, temperature=0.7, entropy="value", value_mask=mask)
    for row, (logps, entropy) in enumerate(plain_read(model, batch, 0.7)):
        torch.testing.assert_close(found.logps[row, : len(logps)], logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.entropy[row, : len(logps)], entropy, rtol=1e-4, atol=1e-5)
        assert not found.logps[row, len(logps) :].any()
        hidden = model.base_model(input_ids=torch.tensor([batch.ids[row]])).last_hidden_state[0]
        values = subject.value_head(hidden[batch.prompt_lengths[row] - 1 : -1]).squeeze(1)
        torch.testing.assert_close(found.values[row, : len(values)], values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(subject.read_values(model, batch, mask), found.values)


def test_dropout_is_off_so_that_a_policy_is_itself(tmp_path):
    model = tiny_model("neox", tiny_tokenizer())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trainer = build(tmp_path, model=model, peft=lora(lora_dropout=0.5))
    trainer.train()
    assert trainer.state.log_history[0]["val/ratio"] == pytest.approx(1, abs=1e-5)


# ---- sampling -----------------------------------------------------------------------------------------------------


def settings(**options):
    return {"max_new_tokens": 6, "batch_size": 4, "stop_ids": [2], "pad_id": 0} | options


def test_a_completion_does_not_depend_on_the_rows_beside_it():
    model = tiny_model("llama", tiny_tokenizer())
    asked, seeds = [[5, 6], [7, 8, 9, 10, 11, 12], [13], [14, 15, 16], [17, 18]], [1, 2, 3, 4, 5]
    together = sampling.sample(model, asked, seeds, **settings())
    for prompt, seed, tokens in zip(asked, seeds, together, strict=True):
        alone = sampling.sample(model, [prompt], [seed], **settings())
        assert sampling.cut_at_stop(alone, [2]) == sampling.cut_at_stop([tokens], [2])
    assert sampling.sample(model, asked, [9, 9, 9, 9, 9], **settings()) != together


def test_a_completion_ends_with_its_first_stop_token():
    # cut after 2; no stop token; stops at once; 9 stops, before the 2; there is nothing
    cut = sampling.cut_at_stop([[5, 2, 7, 2], [5, 6, 7, 8], [2, 5, 5], [5, 9, 6, 2], []], [2, 9])
    assert cut == [([5, 2], True), ([5, 6, 7, 8], False), ([2], True), ([5, 9], True), ([], False)]


def test_completions_are_drawn_from_the_models_distribution():
    # one prompt, 4000 seeds, first token: the shares are the probabilities to within a few standard errors
    model, count = tiny_model("llama", tiny_tokenizer()), 4000
    tokens = sampling.sample(
        model, [[5, 6]] * count, list(range(count)), **settings(max_new_tokens=1, batch_size=count, temperature=0.5)
    )
    shares = torch.bincount(torch.tensor(tokens).flatten(), minlength=model.config.vocab_size) / count
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 0.5).softmax(-1)
    error = (expected * (1 - expected) / count).sqrt().clamp(min=1 / count)
    assert ((shares - expected).abs() < 5 * error).all()


def test_top_k_one_is_greedy_whatever_the_random_number():
    model = tiny_model("neox", tiny_tokenizer())
    greedy = [sampling.sample(model, [[5, 6, 7]], [seed], **settings(top_k=1)) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_batches_hold_sequences_of_like_length():
    # 100, 100 and 90 go together (10 of padding on 290 tokens); with 50 it would be 60 on 340, more than a tenth
    assert sampling.group_by_length([50, 100, 90, 100], limit=8, waste=0.1) == [[1, 3, 2], [0]]
    assert sampling.group_by_length([50, 100, 90, 100], limit=2) == [[1, 3], [2, 0]]
    assert sampling.group_by_length([5, 10, 9, 10], limit=8, waste=0.1) == [[1, 3, 2, 0]]  # not worth a pass


def test_nothing_in_between_changes_the_training(tmp_path):
    class Nuisance(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.rand(state.global_step)
            torch.manual_seed(123)
            trainer.evaluate()

    found = []
    for callbacks in ([], [Nuisance()]):
        trainer = build(tmp_path, max_steps=10, eval_dataset=prompts(3), callbacks=callbacks)
        trainer.train()
        found.append(weights(trainer))
    assert not moved(*found)


def test_sampling_leaves_the_global_random_state_alone(tmp_path):
    trainer = build(tmp_path)
    state = torch.get_rng_state()
    trainer.maker.make(0, trainer.train_dataset, trainer.state)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rollout_engine_gets_prompts_and_seeds_and_is_cut_at_the_stop_token(tmp_path):
    asked = []

    def engine(policy, prompt_ids, seeds):
        asked.append((policy, prompt_ids, seeds))
        return [[50 + i, 2, 99] for i in range(len(prompt_ids))]

    trainer = build(tmp_path, rollout_engine=engine)
    rollout, _ = trainer.maker.make(0, trainer.train_dataset, trainer.state)
    (policy, prompt_ids, seeds), *_ = asked
    assert policy is trainer.model.policy
    assert len(prompt_ids) == len(set(seeds)) == 8
    assert [ids[start:] for ids, start in zip(rollout.ids, rollout.prompt_lengths, strict=True)] == [
        [50 + i, 2] for i in range(8)
    ]


def test_every_epoch_sees_each_prompt_once_in_another_order(tmp_path):
    trainer = build(tmp_path, rollout_engine=lambda policy, prompt_ids, seeds: [[5]] * len(prompt_ids))
    seen = [trainer.maker.make(i, trainer.train_dataset, trainer.state)[0].ids for i in range(4)]
    first, second = [*seen[0], *seen[1]], [*seen[2], *seen[3]]
    assert sorted(first) == sorted(second) == sorted([*trainer.maker.encode(row), 5] for row in trainer.train_dataset)
    assert first != second


# ---- odd rollouts -------------------------------------------------------------------------------------------------


def fixed(*completions):
    return lambda policy, prompt_ids, seeds: [list(completions[i % len(completions)]) for i in range(len(prompt_ids))]


@pytest.mark.parametrize("position", ["eos", "after_eos"])
@pytest.mark.parametrize(
    "completions",
    [([2],), ([],), ([], [5, 6, 2]), ([5],), ([2], [5] * 8), ([5] * 8,), ([5, 2], [6, 6, 6, 6, 6, 6, 6, 2])],
    ids=["stops at once", "no token", "some without", "one token", "very different", "none ended", "all ended"],
)
def test_odd_completions_train_to_finite_weights(tmp_path, completions, position):
    trainer = build(
        tmp_path, rollout_engine=fixed(*completions), reward_position=position, missing_eos_penalty=1.0, max_steps=4
    )
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    assert all(math.isfinite(value) for line in history(trainer) for value in line.values())


def test_unfinished_completions_can_be_left_out_of_the_policy_loss(tmp_path):
    trainer = build(tmp_path, rollout_engine=fixed([5] * 8), mask_truncated_completions=True, kl_coef=0.0)
    before = weights(trainer)
    trainer.train()
    changed = moved(before, weights(trainer))
    assert "value_head.weight" in changed
    assert not any(".default.weight" in name for name in changed)


def test_the_stop_token_belongs_to_the_loss_also_where_it_is_the_pad_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = build(tmp_path, tokenizer=tokenizer, rollout_engine=fixed([5, 6, 2], [5, 2]))
    rollout, _ = trainer.maker.make(0, trainer.train_dataset, trainer.state)
    assert rollout.policy_mask.sum(1).tolist() == [3, 2] * 4
    assert (rollout.old_logps[:, 1] < 0).all()


def test_a_token_of_ones_own_can_end_a_completion(tmp_path):
    tokenizer = tiny_tokenizer()
    stop = tokenizer.convert_tokens_to_ids("x")
    trainer = build(
        tmp_path, stop_token="x", missing_eos_penalty=10.0, rollout_engine=fixed([40, stop, 41], [40, 41, 42])
    )
    rollout, samples = trainer.maker.make(0, trainer.train_dataset, trainer.state)
    assert rollout.policy_mask.sum(1).tolist() == [2, 3] * 4
    assert [sample["score"] > -5 for sample in samples] == [True, False] * 2
    with pytest.raises(ConfigError, match="2 tokens"):
        build(tmp_path, stop_token="xy")


def test_rows_that_no_reward_can_judge_are_in_no_loss(tmp_path):
    def picky(completions, **kwargs):
        return [None if i % 2 else 1.0 + i for i, _ in enumerate(completions)]

    trainer = build(tmp_path, reward_funcs=picky)
    rollout, _ = trainer.maker.make(0, trainer.train_dataset, trainer.state)
    assert not rollout.policy_mask[1::2].any()
    assert not rollout.value_mask[1::2].any()
    assert not rollout.advantages[1::2].any()
    assert rollout.policy_mask[::2].any(1).all()
    trainer.train()
    assert trainer.state.log_history[0]["objective/scores"] == 4.0  # of 1, 3, 5, 7
    trainer = build(tmp_path, reward_funcs=lambda completions, **kwargs: [None] * len(completions))
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_long_prompts_lose_their_start_and_are_counted(tmp_path, caplog):
    trainer = build(tmp_path, max_prompt_length=4)
    trainer.train()
    whole = [trainer.maker.encode(row) for row in trainer.train_dataset]
    assert all(len(ids) > 4 for ids in whole)
    starts = [ids[:start] for ids, start in zip(trainer._rollout.ids, trainer._rollout.prompt_lengths, strict=True)]
    assert all(len(ids) == 4 and ids in [one[-4:] for one in whole] for ids in starts)
    assert trainer.state.log_history[0]["prompts/truncated_ratio"] == 1
    assert caplog.text.count("longer than 4 tokens") == 1


def test_prompts_that_are_over_come_first_in_the_next_epoch(tmp_path):
    trainer = build(tmp_path, train=prompts(12), max_steps=12)  # rollouts of 8
    seen, play = [], trainer.maker.play
    trainer.maker.play = lambda rows, *args, **kwargs: (
        seen.extend(r["prompt"] for r in rows) or play(rows, *args, **kwargs)
    )
    trainer.train()
    assert len(set(seen[:12])) == 12
    assert len(set(seen[12:])) == 12


# ---- rewards ------------------------------------------------------------------------------------------------------


def test_reward_functions_get_what_grpos_get(tmp_path):
    seen = {}

    async def slow(completions, answer, trainer_state, **kwargs):
        return [float(a) for a in answer]

    def judge(prompts, completions, completion_ids, answer, log_metric, log_extra, **kwargs):
        seen.update(prompt=prompts[0], completion=completions[0], ids=completion_ids[0], answer=answer)
        log_metric("judged", len(prompts))
        log_extra("answer", answer)
        return [2.0] * len(prompts)

    chat = [{"role": "user", "content": "count"}]
    train = Dataset.from_dict({"prompt": [chat] * 8, "answer": ["3"] * 8, "completion": ["not for a reward"] * 8})
    trainer = build(tmp_path, train=train, reward_funcs=[judge, slow], reward_weights=[1.0, 10.0])
    trainer.train()
    assert seen["prompt"] == chat
    assert seen["completion"][0]["role"] == "assistant"
    assert seen["answer"] == ["3"] * 8
    assert trainer.processing_class.decode(seen["ids"], skip_special_tokens=True) == seen["completion"][0]["content"]
    first = trainer.state.log_history[0]
    assert (first["objective/scores"], first["rewards/judge/mean"], first["rewards/slow/mean"]) == (32.0, 2.0, 3.0)
    assert first["judged"] == 8


def classifier(tokenizer, kind="neox", labels=1, seed=3):
    base = tiny_model(kind, tokenizer, seed=seed)
    config = copy.deepcopy(base.config)
    config.num_labels = labels
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_model_reads_text_in_its_own_tokenizer_and_template(tmp_path, chat):
    policy, own = tiny_tokenizer(), tiny_tokenizer(pad=False, adds_bos=True)
    own.chat_template = "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] }}{% endfor %}"
    model = classifier(own)
    turn = [{"role": "user", "content": "hello"}]
    train = Dataset.from_dict({"prompt": [turn if chat else "hello"] * 8})
    words = policy.encode("there")
    trainer = build(
        tmp_path,
        train=train,
        tokenizer=policy,
        reward_funcs=model,
        reward_processing_classes=own,
        rollout_engine=fixed([*words, 2], words),
    )
    _, samples = trainer.maker.make(0, trainer.train_dataset, trainer.state)
    texts = ["u:helloa:there"] * 2 if chat else ["hellothere<|eos|>", "hellothere"]
    for sample, text in zip(samples, texts, strict=False):
        ids = own(text, add_special_tokens=not chat)["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits.item()
        assert sample["score"] == pytest.approx(expected, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_value_model_begins_as_the_reward_model_where_it_can(tmp_path):
    tokenizer = tiny_tokenizer()
    reward = classifier(tokenizer, kind="llama")
    trainer = build(tmp_path, reward_funcs=reward, value_mode="separate", tokenizer=tokenizer)
    assert trainer.model.value_model is not reward
    for (name, theirs), ours in zip(reward.named_parameters(), trainer.model.value_model.parameters(), strict=True):
        assert torch.equal(theirs, ours) or name == "score.weight"
    policy = tiny_model("llama", tokenizer)
    trainer = build(tmp_path, model=policy, value_mode="separate", tokenizer=tokenizer)
    assert torch.equal(trainer.model.value_model.model.norm.weight, policy.model.norm.weight)


def test_scores_are_normalised_by_all_that_came_before(tmp_path):
    trainer = build(tmp_path, normalize_scores=True, score_clip=[-1.0, 1.0], max_steps=5)
    trainer.train()
    assert trainer.maker.moments.seen == 16
    log = trainer.state.log_history[0]
    assert abs(log["objective/scores"]) < 1 >= log["objective/scores_std"]


def test_the_kl_coefficient_is_steered_to_its_target(tmp_path):
    trainer = build(tmp_path, target_kl=1e6, kl_horizon=80, max_steps=5, kl_coef=0.1)
    trainer.train()
    log = trainer.state.log_history
    # a KL far below the target: an error of -0.2 over 8 of 80 episodes
    assert log[0]["objective/kl_coef"] == 0.1
    assert log[4]["objective/kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 80))


# ---- metrics, samples, warnings -----------------------------------------------------------------------------------

NAMES = [
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/ratio_var",
    "val/num_eos_tokens",
    "lr",
    "episode",
    "val/explained_variance",
    "completions/mean_length",
    "completions/ended_ratio",
    "time/generate",
    "time/reward",
    "time/reference",
    "time/value",
    "time/optimise",
    "loss",
    "grad_norm",
    "learning_rate",
]


def test_metrics_have_trls_names_and_add_up(tmp_path):
    trainer = build(tmp_path, logging_steps=None, max_steps=8, rollout_engine=fixed([5, 6, 2], [7] * 8))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8]  # once per rollout
    for line in lines:
        assert set(NAMES) <= line.keys()
        assert line["objective/non_score_reward"] == pytest.approx(-0.05 * line["objective/kl"])
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] + line["objective/non_score_reward"]
        )
        assert line["completions/mean_length"] == 5.5
        assert line["completions/ended_ratio"] == 0.5
        assert line["val/num_eos_tokens"] == 4
    assert [line["episode"] for line in lines] == [8, 16]


def test_callbacks_are_shown_completions_with_their_scores(tmp_path):
    class Keep(TrainerCallback):
        def __init__(self):
            self.rows = []

        def on_samples(self, args, state, control, samples, **kwargs):
            self.rows += samples

    keep = Keep()
    trainer = build(tmp_path, callbacks=[keep], num_samples=3, max_steps=5)
    trainer.train()
    assert [(row["step"], row["index"]) for row in keep.rows] == [(s, i) for s in (0, 4) for i in range(3)]
    assert json.loads(json.dumps(keep.rows)) == keep.rows
    for row in keep.rows:
        assert row["prompt"].startswith("number")
        assert row["scores"]["variety"] == pytest.approx(variety([row["completion"]])[0])


def test_a_rollout_without_variance_is_warned_of_once(tmp_path, caplog):
    build(tmp_path, reward_funcs=lambda completions, **kwargs: [1.0] * len(completions), max_steps=9).train()
    assert caplog.text.count("earned the same") == 1


def test_a_policy_that_is_not_itself_is_warned_of_once(tmp_path, caplog):
    model = tiny_model("llama", tiny_tokenizer())
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    build(tmp_path, model=model, max_steps=9).train()
    assert caplog.text.count("the ratio of the first pass is not 1") == 1


def test_a_negative_kl_is_warned_of_once(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    reference = tiny_model("llama", tokenizer)
    with torch.no_grad():
        reference.lm_head.weight[:20] *= 30  # says of tokens below 20 that they are likely, or very unlikely
    ids = torch.tensor([tokenizer(prompts()[0]["prompt"])["input_ids"]])
    likely = int(reference(input_ids=ids).logits[0, -1].argmax())
    build(
        tmp_path, ref_model=reference, rollout_engine=fixed([likely]), train=prompts(1).select([0] * 8), max_steps=9
    ).train()
    assert caplog.text.count("the KL to the reference is negative on average") == 1


def test_evaluation_works_before_training_and_says_the_same_each_time(tmp_path):
    trainer = build(tmp_path, eval_dataset=prompts(5), missing_eos_penalty=3.0)
    first, second = trainer.evaluate(), trainer.evaluate()
    for key in ("eval_objective/scores", "eval_objective/kl", "eval_completions/mean_length"):
        assert first[key] == second[key]
    assert first["eval_objective/kl"] == 0
    assert first["eval_rewards/variety/mean"] == pytest.approx(first["eval_objective/scores"])
    named = build(tmp_path, eval_dataset={"short": prompts(2), "long": prompts(3)}).evaluate()
    assert {"eval_short_objective/scores", "eval_long_objective/scores"} <= named.keys()


# ---- the Trainer's own options ------------------------------------------------------------------------------------


def test_max_steps_total_episodes_and_a_callback_end_the_training(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    for options, steps in [({"max_steps": 3}, 3), ({"max_steps": -1, "total_episodes": 20}, 12),
                           ({"max_steps": -1, "num_train_epochs": 1}, 8), ({"callbacks": [Stop()]}, 2)]:  # fmt: skip
        trainer = build(tmp_path, **options)
        trainer.train()
        assert trainer.state.global_step == steps


@pytest.mark.parametrize("options", [{"bf16": True}, {"optim": "adamw_8bit"}, {"optim": "paged_adamw_8bit"},
                                     {"gradient_checkpointing": True}, {"lr_scheduler_type": "cosine"}],
                         ids=lambda options: next(iter(options)))  # fmt: skip
@pytest.mark.parametrize("mode", ["adapter", "separate"])
def test_options_of_any_trainer_train(tmp_path, mode, options):
    trainer = build(tmp_path, value_mode=mode, **options)
    before = weights(trainer)
    trainer.train()
    changed = moved(before, weights(trainer))
    assert any(".default." in name for name in changed)
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)
    assert trainer.model.score.weight.dtype == torch.float32


def test_bf16_runs_the_layers_in_bfloat16(tmp_path):
    types = []
    model = tiny_model("llama", tiny_tokenizer())
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    build(tmp_path, model=model, bf16=True, max_steps=1).train()
    assert set(types[2:]) == {torch.bfloat16}  # the first two look at the model, before anything is sampled


def test_one_quantized_base_serves_policy_value_and_reference(tmp_path):
    from transformers import BitsAndBytesConfig

    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
    )
    for module in model.modules():  # as runner.models does: its kernel for CPUs has no backward pass
        module.support_avx512bf16_for_cpu = False
    trainer = build(tmp_path, model=model, tokenizer=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == 0
    packed = [n for n, p in trainer.model.named_parameters() if p.dtype == torch.uint8]
    assert len(packed) == 14  # seven projections in two layers, once


def test_a_model_card_can_be_written_as_for_the_hub(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="ours")
    assert (tmp_path / "README.md").is_file()


# ---- files --------------------------------------------------------------------------------------------------------

STATEFUL = {"target_kl": 0.01, "normalize_scores": True, "logging_steps": 3, "max_steps": 10}


@pytest.mark.parametrize(("mode", "peft"), MODES)
def test_a_run_that_is_killed_anywhere_and_resumed_ends_as_if_it_had_not_been(tmp_path, mode, peft):
    options = {"peft": peft, "value_mode": mode, **STATEFUL}
    whole = build(tmp_path / "whole", save_strategy="steps", save_steps=1, **options)
    whole.train()
    expected = weights(whole)
    for step in (3, 4, 9):  # in the middle of a rollout, between two, in the last one
        resumed = build(tmp_path / f"from{step}", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert not moved(expected, weights(resumed))
        assert history(resumed) == history(whole)


def test_a_checkpoint_of_other_sizes_or_without_its_state_is_refused(tmp_path):
    build(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ConfigError, match="'num_ppo_epochs': 2"):
        build(tmp_path, num_ppo_epochs=3).train(resume_from_checkpoint=str(checkpoint))
    weights_file = checkpoint / "value" / "adapter_model.safetensors"
    kept = weights_file.read_bytes()
    weights_file.unlink()
    with pytest.raises(ConfigError, match="missing"):
        build(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    weights_file.write_bytes(kept)
    (checkpoint / "ppo_state.pt").unlink()
    with pytest.raises(ConfigError, match=r"ppo_state\.pt"):
        build(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("mode", ["adapter", "shared", "separate"])
def test_the_result_is_a_plain_adapter_with_the_value_function_beside_it(tmp_path, mode):
    tokenizer = tiny_tokenizer()
    trainer = build(tmp_path, value_mode=mode)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    base = tiny_model("llama", tokenizer)
    plain = PeftModel.from_pretrained(base, tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
        mask = torch.ones(1, 3, dtype=torch.bool)
        with trainer.model.role("value") as player:
            expected = trainer.model.read_values(player, Sequences(ids.tolist(), [1]), mask)[0]
        if mode == "separate":
            value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model" / "value")
            hidden, head = value.base_model(input_ids=ids).last_hidden_state, value.score.weight
        else:
            folder = tmp_path / "model" / "value" if mode == "adapter" else tmp_path / "model"
            value = PeftModel.from_pretrained(tiny_model("llama", tokenizer), folder)
            hidden = value.get_base_model().model(input_ids=ids).last_hidden_state
            state = load_file(tmp_path / "model" / "value" / "value_head.safetensors")
            head = state["weight"]
            expected = expected - state["bias"]
        torch.testing.assert_close((hidden[0, :3] @ head[0]), expected, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "model").rglob("*.bin"))


def test_the_result_of_full_training_is_a_plain_model(tmp_path):
    trainer = build(tmp_path, peft=False, kind="neox")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, trainer.model.policy.state_dict()[name])
    assert {path.name for path in (tmp_path / "model" / "value").iterdir()} >= {"config.json", "model.safetensors"}


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_with_what_to_type(tmp_path):
    tokenizer = tiny_tokenizer()
    larger = classifier(tokenizer)
    larger.config.vocab_size = 5000
    adapted = get_peft_model(tiny_model("llama", tokenizer), lora())
    refused = [
        ({"train": prompts(7)}, "takes 8 prompts and the dataset has 7"),
        ({"reward_funcs": classifier(tokenizer, labels=2)}, "2 labels"),
        ({"peft": False, "value_mode": "adapter"}, "choose peft=lora"),
        ({"reward_funcs": larger}, "5000 tokens and the policy 293"),
        ({"value_mode": "separate", "value_model": larger}, "value_model cannot read"),
        ({"peft": lora(bias="all")}, "puts a second adapter on"),
        ({"peft": lora(bias="all"), "value_mode": "shared"}, "nothing can serve as one"),
        ({"generation_kwargs": {"num_beams": 2, "repetition_penalty": 1.1}}, "generation_kwargs cannot set num_beams:"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha has no place"),
        ({"whiten_rewards": True, "num_mini_batches": 1}, "whiten_rewards needs 8"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"model": adapted}, "an adapter already"),
        ({"reward_weights": [1.0, 2.0]}, "there are 1 rewards"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"max_completion_length": 512}, "no room for a prompt"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            build(tmp_path, **{"tokenizer": tokenizer} | options)


def test_a_reward_that_is_no_number_for_each_completion_is_refused(tmp_path):
    for values in ([1.0], [math.inf] * 8):
        with pytest.raises(ConfigError, match=f"returned {len(values)} values for 8"):
            build(tmp_path, reward_funcs=lambda completions, v=values, **kwargs: v).train()


def test_options_out_of_range_are_refused_all_at_once():
    wrong = {"gamma": 1.5, "dual_clip": 0.5, "target_kl": 1.0, "kl_coef": 0.0, "temperature": 0.0, "kl_horizon": 0,
             "score_clip": [5.0, -5.0], "log_ratio_clamp": -1.0, "cliprange_value": -0.2, "total_episodes": -640,
             "max_prompt_length": 0}  # fmt: skip
    with pytest.raises(ConfigError) as refusal:
        PPOConfig(output_dir="x", use_cpu=True, **wrong)
    for name in wrong.keys() - {"kl_coef"}:  # which may be 0, but not with target_kl
        assert f"{name} (" in str(refusal.value)
    off = dict.fromkeys(["target_kl", "score_clip", "log_ratio_clamp", "cliprange_value", "total_episodes"])
    assert PPOConfig(output_dir="x", use_cpu=True, **off).cliprange_value is None


# ---- several processes --------------------------------------------------------------------------------------------

WORKER = """
import sys
sys.path[:0] = {paths!r}
import os, torch
from test_ppo import build, report, shared_options
for mode in ("adapter", "separate"):
    trainer = build({out!r} + mode, per_device_train_batch_size=2, value_mode=mode, **shared_options())
    trainer.train()
    found = report(trainer)
    if trainer.args.process_index == 0:
        torch.save(found, {out!r} + mode + ".pt")
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo sometimes hangs at exit
"""


def shared_options():
    return {"max_steps": 6, "optim": "sgd", "learning_rate": 1.0, "eval_dataset": prompts(3), "whiten_rewards": True}


def report(trainer):
    return weights(trainer), trainer.state.log_history, trainer.evaluate()


def test_two_processes_take_the_steps_of_one(tmp_path):
    run_ranks(first=WORKER.format(paths=[str(Path(__file__).resolve().parent)], out=f"{tmp_path}/two_"))
    for mode in ("adapter", "separate"):
        trainer = build(tmp_path / "one", per_device_train_batch_size=4, value_mode=mode, **shared_options())
        trainer.train()
        one, lines, held_out = report(trainer)
        two, lines_two, held_out_two = torch.load(f"{tmp_path}/two_{mode}.pt", weights_only=False)
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        for line, other in zip(lines, lines_two, strict=True):
            for key in {"loss", "objective/scores", "objective/kl", "val/explained_variance"} & line.keys():
                assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
        assert held_out["eval_objective/scores"] == pytest.approx(held_out_two["eval_objective/scores"], abs=1e-6)


# ---- learning -----------------------------------------------------------------------------------------------------


def thirteen_words():
    """A tokenizer of thirteen words and three special tokens: chance finds a rewarded word soon."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(13))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize(("mode", "peft"), [("adapter", True), ("shared", True), ("separate", False)])
def test_it_learns_to_write_what_is_rewarded(tmp_path, mode, peft):
    trainer = build(
        tmp_path,
        peft=peft,
        value_mode=mode,
        tokenizer=thirteen_words(),
        train=Dataset.from_dict({"prompt": [f"w{i % 13} w{i % 7}" for i in range(32)]}),
        reward_funcs=lambda completions, **kwargs: [text.split().count("w7") / 12 for text in completions],
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=4,
        max_completion_length=12,
        max_steps=56,
        learning_rate=5e-3 if peft else 2e-3,
        lr_scheduler_type="constant",
        kl_coef=0.005,
        logging_steps=None,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    scores, kls = ([line[f"objective/{name}"] for line in lines] for name in ("scores", "kl"))
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.25
    assert all(-1 < kl < 50 for kl in kls)
