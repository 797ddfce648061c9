import json
import random

import numpy
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import PrinterCallback, Trainer, TrainingArguments

from runner.callbacks import MetricsWriter
from runner.errors import RunStopped
from runner.evaluation import Samples, generate, held_out, untouched_random_state
from runner.rewards import Scorer

USER, RIGHT, WRONG = ({"role": r, "content": c} for r, c in [("user", "1+1"), ("assistant", "2"), ("assistant", "3")])
PROMPTS = ["the rest is here", "in", "on and on", "a"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model("llama", tokenizer)


def encoded(tokenizer):
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def by_hand(model, tokenizer, ids, count, stops=()):
    """Greedy decoding as the definition has it: the whole sequence again for every token."""
    ids = list(ids)
    new = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in {tokenizer.eos_token_id, *stops}:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "1+1", "completion": "2"}, "1+1", "2"),
        ({"prompt": "1+1", "answer": ["2", "two"]}, "1+1", "2 | two"),
        ({"prompt": "1+1", "answer": []}, "1+1", None),
        ({"prompt": [USER], "completion": [RIGHT]}, [USER], "2"),
        ({"prompt": "1+1", "chosen": "2", "rejected": "3"}, "1+1", "2"),
        ({"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, [USER], "2"),
        ({"prompt": "1+1", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, [USER], "2"),
        ({"messages": [USER, RIGHT]}, [USER], "2"),
        ({"messages": [USER, RIGHT, USER]}, [USER, RIGHT, USER], None),
        ({"prompt": [USER], "completion": [RIGHT], "label": True}, [USER], "2"),
        ({"prompt": [USER], "completion": [WRONG], "label": False}, [USER], None),
        ({"prompt": [USER], "answer": 2}, [USER], "2"),
    ],
)
def test_every_kind_of_row_gives_its_prompt_and_a_right_answer(row, prompt, reference):
    (found,) = held_out([row], 1)
    assert (found["prompt"], found["reference"]) == (prompt, reference)


def test_rows_without_a_prompt_are_passed_over_and_columns_kept():
    rows = [{"text": "no prompt"}, {"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c"}]
    assert held_out(rows, 2) == [
        {"prompt": "a", "answer": "1", "reference": "1"},
        {"prompt": "b", "reference": None},
    ]


def texts(*args, **options):
    return [answer.text for answer in generate(*args, **options)]


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(tokenizer, kind):
    model = tiny_model(kind, tokenizer)
    answers = texts(model, tokenizer, encoded(tokenizer), max_new_tokens=12, batch_size=3)
    assert answers == [by_hand(model, tokenizer, ids, 12) for ids in encoded(tokenizer)]
    assert len(set(answers)) > 1


def test_an_answer_ends_at_any_of_the_stop_tokens(tokenizer, model):
    (ids,) = [tokenizer("the rest is here")["input_ids"]]
    tokens = tokenizer(texts(model, tokenizer, [ids], max_new_tokens=12, batch_size=1)[0])["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokens[3]]
    cut = by_hand(model, tokenizer, ids, 12, stops=[tokens[3]])
    assert texts(model, tokenizer, [ids], max_new_tokens=12, batch_size=1) == [cut]
    assert len(cut) < len(tokenizer.decode(tokens))


def test_settings_for_sampling_neither_count_nor_warn(tokenizer, model, caplog, recwarn):
    plain = texts(model, tokenizer, encoded(tokenizer), max_new_tokens=12, batch_size=4)
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 5.0}
    model.generation_config.update(**own)
    assert texts(model, tokenizer, encoded(tokenizer), max_new_tokens=12, batch_size=4) == plain
    assert model.generation_config.temperature == 0.7
    assert not caplog.records
    assert not recwarn.list


def test_the_adapter_answers_not_its_base(tokenizer, model):
    from peft import LoraConfig, get_peft_model

    base = texts(model, tokenizer, encoded(tokenizer), max_new_tokens=8, batch_size=4)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert texts(adapted, tokenizer, encoded(tokenizer), max_new_tokens=8, batch_size=4) == base  # B is zero
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    answers = texts(adapted, tokenizer, encoded(tokenizer), max_new_tokens=8, batch_size=4)
    assert answers != base
    merged = adapted.merge_and_unload()
    assert answers == [by_hand(merged, tokenizer, ids, 8) for ids in encoded(tokenizer)]


def test_generation_uses_the_cache_under_gradient_checkpointing_and_restores_the_modes(tokenizer, model):
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(model, tokenizer, encoded(tokenizer), max_new_tokens=4, batch_size=4)
    hook.remove()
    assert widths == [max(len(ids) for ids in encoded(tokenizer)), 1, 1, 1]
    assert [module.training for module in model.modules()] == modes


def test_random_numbers_are_given_back():
    def draw():
        return torch.rand(1).item(), numpy.random.rand(), random.random()

    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)
    expected = draw()
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)
    with untouched_random_state():
        draw()
    assert draw() == expected


def test_samples_are_written_scored_and_averaged(tokenizer, model, tmp_path):
    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    def shared(prompts, completions, answer, **columns):
        assert prompts == ["in", "on"]
        assert answer == ["x", None]
        assert "completion" not in columns
        return [1.0, None]

    def silent(completions, **columns):
        return [None] * len(completions)

    rows = held_out([{"prompt": "in", "answer": "x"}, {"prompt": "on", "completion": "y"}], 2)
    scores = {"length": length, "shared": shared, "silent": silent}
    samples = Samples(tmp_path, rows, tokenizer, scores, max_new_tokens=5, batch_size=1)
    means = samples.measure(model, step=7)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["index"], line["prompt"], line["reference"]) for line in lines] == [
        (7, 0, "in", "x"),
        (7, 1, "on", "y"),
    ]
    assert not any(line["ended"] for line in lines)  # all were cut at the limit
    sizes = [len(line["completion"]) for line in lines]
    assert lines[0]["scores"] == {"length": sizes[0], "shared": 1.0, "silent": None}
    assert means == {"eval_length": sum(sizes) / 2, "eval_shared": 1.0}


def test_answers_to_messages_are_scored_as_messages(tokenizer, model, tmp_path):
    def seen(completions, **columns):
        assert [turn["role"] for turn in completions[0]] == ["assistant"]
        return [1.0]

    samples = Samples(tmp_path, held_out([{"messages": [USER, RIGHT]}], 1), tokenizer, {"seen": seen}, max_new_tokens=3)
    assert samples.measure(model, step=0) == {"eval_seen": 1.0}
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    # The prompt is rendered up to the assistant's turn: <bos><user>1+1<eos><assistant>.
    assert line["completion"] == by_hand(
        model, tokenizer, tokenizer("<|bos|><|user|>1+1<|eos|><|assistant|>")["input_ids"], 3
    )


def test_a_prompt_that_leaves_no_room_is_passed_over_and_counted(tokenizer, model, tmp_path, caplog):
    # The context is 512 tokens; 'x' is one token each.
    rows = held_out([{"prompt": "x" * 503}, {"prompt": "x" * 502}], 2)
    samples = Samples(tmp_path, rows, tokenizer, {"one": lambda completions, **_: [1.0]}, max_new_tokens=10)
    assert samples.measure(model, step=0) == {"eval_one": 1.0}
    assert "1 of 2 held-out prompts are not answered" in caplog.text
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "answer"), [([1.0, 2.0], "it gave 2 values for 1 completions"), ([float("nan")], "it gave nan")]
)
def test_a_score_without_a_number_for_each_answer_ends_the_run(tokenizer, model, tmp_path, values, answer):
    odd = Scorer(lambda completions, **_: values, name="odd", options={})
    with pytest.raises(RunStopped, match=f"The reward odd failed: {answer}"):
        Samples(tmp_path, [{"prompt": "a"}], tokenizer, {"odd": odd}, max_new_tokens=2).measure(model, step=0)


def train(tokenizer, folder, *, sampled):
    """Train four steps with dropout, evaluating at every second; return the trainer."""
    model = tiny_model("llama", tokenizer)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded(tokenizer)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 1},
        **{
            "max_steps": 4,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_eval_batch_size": 1,
        },
        **{
            "save_strategy": "best",
            "metric_for_best_model": "eval_grade",
            "greater_is_better": True,
            "eval_on_start": True,
        },
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[MetricsWriter(folder)]
    )
    trainer.remove_callback(PrinterCallback)
    if sampled:

        def grade(completions, **columns):
            torch.rand(1), random.random(), numpy.random.rand()  # a score may draw
            return [float(trainer.state.global_step)] * len(completions)

        rows = held_out([{"prompt": text} for text in PROMPTS], 4)
        trainer.add_callback(Samples(folder, rows, tokenizer, {"grade": grade}, max_new_tokens=4, log=trainer.log))
    else:
        trainer.args.save_strategy = "no"
        trainer.args.metric_for_best_model = None
    trainer.train()
    return trainer


def test_sampling_changes_nothing_of_the_training_and_can_choose_the_best_checkpoint(tokenizer, tmp_path):
    folders = [tmp_path / "plain", tmp_path / "sampled"]
    for folder in folders:
        folder.mkdir()
    plain, sampled = (train(tokenizer, folder, sampled=folder.name == "sampled") for folder in folders)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (plain, sampled)]
    assert losses[0] == losses[1]
    for a, b in zip(plain.model.parameters(), sampled.model.parameters(), strict=True):
        assert torch.equal(a, b)

    assert sampled.state.best_metric == 4.0
    assert sampled.state.best_model_checkpoint.endswith("checkpoint-4")
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["eval_grade"]) for line in lines if "eval_grade" in line] == [
        (0, 0.0),
        (2, 2.0),
        (4, 4.0),
    ]
    samples = (folders[1] / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0] * 4 + [2] * 4 + [4] * 4
