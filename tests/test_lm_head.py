from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from test_run import lines, start
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trl.kernels import chunked_logprob
from trl.trainer import utils

from runner import manifest
from runner.lm_head import compact_lm_head, compact_pairs
from runner.prefix_sharing import share_prefixes

FIELDS = ("log_probs", "entropy", "is_top1")
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
PROMPTS = ["what is it", "and then there is one that is rather longer", "ok", "no"]


@pytest.fixture(autouse=True)
def upstream(monkeypatch):
    """Start from TRL as installed, and leave it so."""
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)


def fused(kind, temperature=0.7):
    model = tiny_model(kind, tiny_tokenizer())
    utils.add_fused_lm_head(model, temperature=temperature, outputs=FIELDS)
    return model


def masked_batch():
    # Three rows of 10 tokens: a prompt of 4 without loss, padding of 3 without loss, and a row without any loss.
    ids = torch.randint(7, 290, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = labels[2] = -100
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def score(model):
    model.zero_grad()
    out = model(**masked_batch(), fused_lm_head=True)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_every_output_and_gradient_stays_the_same(kind):
    before, gradients = score(fused(kind))
    assert compact_lm_head()
    after, compact_gradients = score(fused(kind))
    for field in ("loss", *FIELDS):
        torch.testing.assert_close(getattr(after, field), getattr(before, field), atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compact_gradients[name], gradient, atol=1e-5, rtol=1e-5)


def test_only_supervised_positions_are_scored(monkeypatch):
    scored = []

    class Counting(utils._ChunkedLogProbFunction):
        @staticmethod
        def forward(ctx, hidden, *rest):
            scored.append(hidden.shape[0])
            return utils_function.forward(ctx, hidden, *rest)

    utils_function = utils._ChunkedLogProbFunction
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    score(fused("llama"))
    compact_lm_head()
    score(fused("llama"))
    # Next-token labels: 3 x 9 in all; row 0 has tokens 4..9 = 6, row 1 tokens 1..6 = 6, row 2 none.
    assert scored == [27, 12]


def test_a_batch_without_any_label_still_has_a_gradient_of_zero():
    compact_lm_head()
    model = fused("llama")
    batch = masked_batch()
    batch["labels"][:] = -100
    out = model(**batch, fused_lm_head=True)
    out.loss.backward()
    assert out.loss.item() == 0
    assert not any(p.grad is not None and p.grad.abs().sum() for p in model.parameters())


def test_the_choice_of_kernels_stays_upstreams():
    before = chunked_logprob._use_triton
    compact_lm_head()
    assert chunked_logprob._use_triton is before
    assert not chunked_logprob._use_triton(torch.device("cpu"))
    assert utils._use_triton(torch.device("cpu"))
    assert not utils._use_triton(torch.device("hpu"))  # compiles for each shape


def test_it_is_replaced_once():
    assert compact_lm_head()
    first = utils._use_triton
    assert compact_lm_head()
    assert utils._use_triton is first


@pytest.mark.parametrize("change", ["version", "name", "source"])
def test_a_trl_that_was_not_read_keeps_its_own_way(monkeypatch, change):
    if change == "version":
        monkeypatch.setattr("runner.trainer_source.version", lambda name: "1.17.0")
    elif change == "name":
        monkeypatch.delattr(utils, "_use_triton")
    else:
        monkeypatch.setattr("inspect.getsource", lambda module: "_use_triton(a)\n_use_triton(b)")
    kept = getattr(utils, "_use_triton", None)
    assert not compact_lm_head()
    assert getattr(utils, "_use_triton", None) is kept


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
def test_a_run_under_a_trl_that_was_not_read_learns_the_same_and_says_so(trainer, llama_dir, tmp_path, monkeypatch):
    known, _ = start(tmp_path, f"trainer={trainer}", f"model.name_or_path={llama_dir}", name="known")
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr("runner.trainer_source.version", lambda name: "1.17.0")
    unknown, _ = start(tmp_path, f"trainer={trainer}", f"model.name_or_path={llama_dir}", name="unknown")
    assert [manifest.read(run_dir)["upstream_was_read"] for run_dir in (known, unknown)] == [True, False]
    assert "was not compared" in manifest.read(unknown)["speed"]["prefix_sharing"]["refused"]
    losses = [[line["loss"] for line in lines(run_dir) if "loss" in line] for run_dir in (known, unknown)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def chars(completions, **_):
    return [float(len(set(text))) for text in completions]


def train(name, folder):
    """Return losses and gradient norms of two steps of one of TRL's trainers."""
    rows = [{"prompt": p, "completion": f" {p[::-1]}", "label": n % 2 == 0} for n, p in enumerate(PROMPTS)]
    model, more, options = tiny_model("llama", tiny_tokenizer()), {}, {}
    if name in ("GRPO", "RLOO"):
        rows, more = [{"prompt": p} for p in PROMPTS], {"reward_funcs": chars}
        model = str(save_tiny(folder / "model"))  # the reference is read again
        options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 0.7}
    elif name == "DPO":
        rows = [{"prompt": p, "chosen": f" {p[::-1]}", "rejected": " the end"} for p in PROMPTS]
    if name in ("DPO", "KTO"):
        more, options = {"ref_model": tiny_model("llama", tiny_tokenizer(), seed=1)}, {"beta": 0.5}
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(output_dir=str(folder), **COMMON, **options),
        train_dataset=Dataset.from_list([{k: row[k] for k in row if k != "label" or name == "KTO"} for row in rows]),
        processing_class=tiny_tokenizer(),
        **more,
    )
    trainer.train()
    return [log[key] for log in trainer.state.log_history if "loss" in log for key in ("loss", "grad_norm")]


PAIRS = {
    "ORPO": {"beta": 0.3},
    "CPO": {"label_smoothing": 0.1},
    "CPO ipo": {"loss_type": "ipo"},
    "CPO simpo": {"loss_type": "simpo", "cpo_alpha": 0.5},
    "CPO simpo alone": {"loss_type": "simpo", "cpo_alpha": 0.0},
}


def pair_trainer(name, folder, *, compact, adapter=None):
    """Return a trainer that makes logits of whole pairs, and how often it shared what they have in common."""
    import importlib

    kind = name.split()[0]
    module = importlib.import_module(f"trl.experimental.{kind.lower()}")
    rows = [{"prompt": p, "chosen": f" {p[::-1]}", "rejected": " the end"} for p in PROMPTS]
    model = tiny_model("llama", tiny_tokenizer())
    sharing = share_prefixes([model] if compact else [], SimpleNamespace(), adapter, trainer=kind.lower())
    trainer = getattr(module, f"{kind}Trainer")(
        model=model,
        args=getattr(module, f"{kind}Config")(
            output_dir=str(folder),
            **COMMON | PAIRS[name] | {"learning_rate": 1e-4},
            eval_strategy="steps",
            eval_steps=1,
            max_length=64,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[1:]),
        processing_class=tiny_tokenizer(),
        peft_config=adapter,
    )
    assert not compact or compact_pairs(trainer)
    return trainer, sharing


def train_pairs(name, folder, *, compact, adapter):
    """Return all metrics of two steps and two evaluations."""
    trainer, sharing = pair_trainer(name, folder, compact=compact, adapter=adapter)
    trainer.train()
    assert (sharing.shared > 0) == compact
    times = ("runtime", "per_second", "epoch", "step")
    return [{k: v for k, v in log.items() if not k.endswith(times)} for log in trainer.state.log_history[:-1]]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")])
@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_whole_pairs_stay_the_same_without_their_logits(tmp_path, name, adapter, monkeypatch):
    before = train_pairs(name, tmp_path / "upstream", compact=False, adapter=adapter)
    monkeypatch.setattr(torch.nn.Linear, "forward", no_logits(torch.nn.Linear.forward))
    after = train_pairs(name, tmp_path / "compact", compact=True, adapter=adapter)
    for log, other in zip(before, after, strict=True):
        same = [key for key in log if "logits/" not in key]
        assert [other[key] for key in same] == pytest.approx([log[key] for key in same], abs=1e-5, rel=1e-5)
        assert other.keys() == log.keys()
    assert len(before) == 4


@pytest.mark.parametrize("reason", ["liger", "experts", "type"])
def test_where_the_head_is_not_known_to_be_the_same_the_pairs_are_left_as_they_were(tmp_path, reason):
    trainer, _ = pair_trainer("CPO", tmp_path, compact=False)
    trainer.args.use_liger_kernel = reason == "liger"
    trainer.aux_loss_enabled = reason == "experts"
    trainer.model.config.model_type = "xlstm" if reason == "type" else "llama"
    assert not compact_pairs(trainer)
    assert "concatenated_forward" not in vars(trainer)


def test_pairs_whose_answers_are_cut_off_are_as_upstream_has_them(tmp_path):
    found = []
    for compact in (False, True):
        trainer, _ = pair_trainer("CPO simpo alone", tmp_path / str(compact), compact=compact)
        batch = next(iter(trainer.get_train_dataloader()))
        batch["chosen_labels"][:] = -100
        _, rejected, logits, _, loss = trainer.concatenated_forward(trainer.model, batch)
        found.append([*rejected.tolist(), loss.item(), logits.mean().isfinite().item()])
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_the_mean_logits_of_a_pair_are_those_of_its_answers(tmp_path, name):
    trainer, _ = pair_trainer(name, tmp_path, compact=True)
    batch = next(iter(trainer.get_train_dataloader()))
    _, _, chosen, rejected, _ = trainer.concatenated_forward(trainer.model, batch)
    for side, found in (("chosen", chosen), ("rejected", rejected)):
        given = {key: batch[f"{side}_{key}"] for key in ("input_ids", "attention_mask")}
        logits = trainer.model(**given).logits[:, :-1][batch[f"{side}_labels"][:, 1:] != -100]
        assert found.mean().item() == pytest.approx(logits.mean().item(), abs=1e-5)


def no_logits(forward):
    """Return a linear layer's pass that makes no logits of the vocabulary."""

    def checked(self, hidden):
        assert self.out_features < len(tiny_tokenizer()), "the LM head reads all positions"
        return forward(self, hidden)

    return checked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_training_losses_stay_the_same(tmp_path, name):
    before = train(name, tmp_path / "upstream")
    assert compact_lm_head()
    assert train(name, tmp_path / "compact") == pytest.approx(before, abs=1e-5, rel=1e-5)
    assert len(before) == 4
    assert before[1] != before[3]
