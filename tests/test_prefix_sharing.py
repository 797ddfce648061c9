from random import Random
from types import SimpleNamespace

import pytest
import torch
from peft import LilyConfig, LoraConfig, PromptTuningConfig, XLoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import VeloraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from runner.prefix_sharing import ADAPTERS, TRAINERS, TYPES, plan_rows, see_own, share_prefixes

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None, "attention_dropout": 0.0,
}  # fmt: skip


def model_of(kind, attention="sdpa", auto=AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    more = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    return auto.from_config(AutoConfig.for_model(kind, **SHAPE | more | changes), attn_implementation=attention)


def pairs(side="right"):
    # Three pairs of 12 tokens with 8, 5 and 12 in common, and padding of 0, 2, 3 and 1, 0, 3 tokens.
    ids = torch.randint(7, 290, (6, 12), generator=torch.Generator().manual_seed(0))
    for row, common in enumerate((8, 5, 12)):
        ids[row + 3, :common] = ids[row, :common]
    real = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 3, 1, 0, 3)):
        if padding:
            real[row, -padding:] = 0
        if side == "left":
            ids[row], real[row] = ids[row].roll(padding), real[row].roll(padding)
    return ids.masked_fill(real == 0, 0), real


def outputs(model, side="right"):
    """Return the output at real tokens, or a classifier's score, and the gradients of a loss on it."""
    ids, real = pairs(side)
    out = model(input_ids=ids, attention_mask=real).logits
    model.zero_grad()
    out = out[real.bool()] if out.dim() == 3 else out
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs_and_gradients_are_those_of_whole_rows(kind, attention):
    model = model_of(kind, attention)
    before = outputs(model)
    sharing = share_prefixes([model], SimpleNamespace(), None, trainer="dpo")
    torch.testing.assert_close(outputs(model), before, atol=1e-5, rtol=1e-5)
    # the pairs have 12 + 11 - 8 = 15, 10 + 12 - 5 = 17 and 9 tokens; attention that writes its scores is dear
    read = 15 + 17 + 9 if attention == "sdpa" else 3 * 17
    assert (sharing.passes, sharing.shared, sharing.padded, sharing.read) == (1, 1, 6 * 12, read)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_padding_may_be_on_the_left_and_a_classifier_reads_its_last_token(auto):
    model = model_of("llama", auto=auto)
    before = outputs(model, "left")
    sharing = share_prefixes([model], SimpleNamespace(), None, trainer="dpo")
    torch.testing.assert_close(outputs(model, "left"), before, atol=1e-5, rtol=1e-5)
    assert sharing.shared == 1


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_with_an_adapter_outputs_and_gradients_are_those_of_whole_rows(kind):
    def adapted(*, shares):
        model = model_of("llama", num_key_value_heads=4)  # as wide on all sides
        sharing = share_prefixes([model] if shares else [], SimpleNamespace(), config, trainer="sft")
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:  # some adapters begin as nothing
                parameter.data += 0.1 * torch.randn_like(parameter)
        return outputs(model), sharing.shared

    more = {"IA3": {"feedforward_modules": []}, "ADALORA": {"total_step": 10}, "MISS": {"r": 4}}.get(kind, {})
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **more)
    (before, _), (after, shared) = adapted(shares=False), adapted(shares=True)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert shared == 1


def test_rows_become_one_and_go_back():
    # By the alphabet: 5 6 7, then 5 6 8 9, which adds its last two, then 5 7, which adds its last; 0 is padding.
    ids = torch.tensor([[5, 7, 0, 0], [5, 6, 8, 9], [0, 5, 6, 7]])
    plan = plan_rows(ids, ids > 0, per_token=100)
    assert ids.flatten()[plan.source].tolist() == [[5, 6, 7, 8, 9, 7]]
    assert plan.position.tolist() == [[0, 1, 2, 2, 3, 1]]
    assert plan.row.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert plan.until.tolist() == [[2, 1, 0, 1, 1, 2]]
    assert plan.back.tolist() == [[0, 5, 5, 5], [0, 1, 3, 4], [0, 0, 1, 2]]  # padding gets what is beside it
    assert see_own(plan)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("per_token", [1, 10, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_sees_its_own_row_up_to_itself_and_nothing_else(monkeypatch, per_token, seed):
    monkeypatch.setattr("runner.estimate.SAVES", 9)  # as if it always paid
    chance = Random(seed)
    size, many = chance.randint(2, 9), chance.randint(2, 9)
    rows = [chance.choices((1, 2), k=chance.randint(1, size)) for _ in range(many)]
    padded = [[[0] * (size - len(row)), []][:: chance.choice((1, -1))] for row in rows]
    ids = torch.tensor([before + row + after for row, (before, after) in zip(rows, padded, strict=True)])
    plan = plan_rows(ids, ids > 0, per_token=per_token)
    sees, tokens = see_own(plan)[:, 0].flatten(0, 1), ids.flatten()[plan.source]
    for row, (before, _), back in zip(rows, padded, plan.back.tolist(), strict=True):
        for place in range(len(row)):
            at = back[len(before) + place]
            of = at // plan.source.shape[1]
            seen = zip(plan.position[of][sees[at]].tolist(), tokens[of][sees[at]].tolist(), strict=True)
            assert sorted(seen) == list(enumerate(row[: place + 1]))
    assert sees.any(1).all()  # a row of nothing has no softmax


def test_rows_with_a_gap_or_without_a_token_are_not_moved():
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    assert plan_rows(ids, torch.tensor([[1, 1, 1], [1, 1, 1]]).bool(), per_token=100) is not None
    assert plan_rows(ids, torch.tensor([[1, 0, 1], [1, 1, 1]]).bool(), per_token=100) is None
    assert plan_rows(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]).bool(), per_token=100) is None


def test_rows_that_share_too_little_are_read_as_they_come():
    model = model_of("llama")
    sharing = share_prefixes([model], SimpleNamespace(), None, trainer="dpo")
    ids = torch.arange(7, 31).view(2, 12)
    ids[1, 0] = ids[0, 0]  # 23 of 24 tokens would be left
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert (sharing.passes, sharing.shared, sharing.read, sharing.refused) == (1, 0, 24, "")


def test_a_model_without_a_width_is_left_as_it_was():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3"))
    sharing = share_prefixes([model], SimpleNamespace(), None, trainer="dpo")
    assert sharing.refused == "models of type gemma3 were not tested with it"


def test_answers_are_sampled_as_ever():
    ids, real = pairs("left")
    model = model_of("llama").eval()
    before = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=4, do_sample=False)
    sharing = share_prefixes([model], SimpleNamespace(), None, trainer="dpo")
    after = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=4, do_sample=False)
    assert after.tolist() == before.tolist()
    assert sharing.passes == 0


LLAMA = ("llama", "sdpa")


@pytest.mark.parametrize(
    ("model", "adapter", "arguments", "why"),
    [
        (("gpt2", "sdpa"), None, {}, "models of type gpt2 were not tested with it"),
        (("mistral", "sdpa", {"sliding_window": 8}), None, {}, "the model's attention has a window"),
        (("llama", "flex_attention"), None, {}, "flex_attention attention takes no mask for it"),
        (("llama", "sdpa", {"attention_dropout": 0.1}), None, {"disable_dropout": True}, "dropout differs"),
        (LLAMA, LoraConfig(lora_dropout=0.1), {}, "dropout differs"),
        (LLAMA, LoraConfig(lora_dropout=0.1), {"disable_dropout": True}, ""),
        (LLAMA, LoraConfig(alora_invocation_tokens=[5]), {}, "LoraConfig looks at rows as they come"),
        (LLAMA, LoraConfig(velora_config=VeloraConfig()), {}, "LoraConfig looks at rows as they come"),
        (LLAMA, LilyConfig(), {}, "LilyConfig looks at rows as they come"),
        (LLAMA, XLoraConfig(hidden_size=32, adapters={"one": "nowhere"}), {}, "XLoraConfig looks at rows as they come"),
        (LLAMA, PromptTuningConfig(num_virtual_tokens=2), {}, "PromptTuningConfig looks at rows as they come"),
        (LLAMA, None, {"use_liger_kernel": True}, "trainer.use_liger_kernel=True"),
        (LLAMA, None, {"neftune_noise_alpha": 5}, "trainer.neftune_noise_alpha=5"),
    ],
)
def test_a_model_that_cannot_says_why_and_is_left_as_it_was(caplog, model, adapter, arguments, why):
    caplog.set_level("INFO", logger="runner")
    kind, attention, changes = (*model, {})[:3]
    model = model_of(kind, attention, **changes)
    sharing = share_prefixes([model, None, model], SimpleNamespace(**arguments), adapter, trainer="dpo")
    assert why in sharing.refused
    assert bool(why) == bool(sharing.refused)
    assert sharing.refused in caplog.text
    assert len(caplog.records) == bool(why)
    assert ("forward" in vars(model.base_model)) == (not why)


def test_ppo_reads_rows_as_they_come():
    model = model_of("llama")
    share_prefixes([model], SimpleNamespace(), None, trainer="ppo")
    assert "forward" not in vars(model.base_model)
    assert "ppo" not in TRAINERS
