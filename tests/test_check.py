"""What a check says before a run: tiny models, rows that are broken on purpose, numbers by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from commands import run as command
from tiny import TEMPLATE, save_tiny

from runner import compose, manifest
from runner.__main__ import prepare, write_run
from runner.check import check, read_options
from runner.config import option_names
from runner.errors import ConfigError
from runner.run import run

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"prompt": "th", "completion": "zq"}


def write_rows(folder, train, held_out=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", held_out)):
        if rows:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "dataset=local", f"dataset.path={folder}", *([] if held_out else ["dataset.eval=null"]),
        f"output_dir={folder / 'run'}",
    ]  # fmt: skip


def found(words, name):
    """Return the texts of a finding, and the rows that they name."""
    done = check(words)
    return [(one.text, list(one.rows)) for _, one in done.found if one.name == name]


@pytest.fixture
def base(llama_dir):
    return [f"model.name_or_path={llama_dir}"]


def with_template(template, folder):
    path = folder / "chat.jinja"
    path.write_text(template)
    return f"model.chat_template={path}"


# ---------------------------------------------------------------- what is found in rows, by its row


def test_a_truncated_file_is_a_fault_that_names_its_line(base, tmp_path, capsys):
    words = write_rows(tmp_path / "rows", [PLAIN, PLAIN])
    path = tmp_path / "rows" / "train.jsonl"
    path.write_text(path.read_text()[:-8])
    assert check([*base, *words]).failed
    assert "train.jsonl:2" in capsys.readouterr().out


def test_a_file_in_another_encoding_is_a_fault(base, tmp_path, capsys):
    words = write_rows(tmp_path / "rows", [PLAIN])
    (tmp_path / "rows" / "train.jsonl").write_bytes('{"text": "你好"}'.encode("gb18030"))
    assert check([*base, *words]).failed
    assert "iconv" in capsys.readouterr().out


def test_an_empty_completion_is_a_fault_that_names_its_row(base, tmp_path):
    words = write_rows(tmp_path / "rows", [PLAIN, {"prompt": "a", "completion": ""}])
    assert "train.jsonl:2: completion is empty" in found([*base, *words], "data")[0][0]


def test_rows_that_are_there_twice_or_held_out_too_are_named(base, tmp_path):
    train = [{"prompt": f"q{n}", "completion": "a"} for n in (1, 2, 1)]
    held_out = [{"prompt": "q9", "completion": "a"}, {"prompt": "Q2 ", "completion": "b"}]
    done = check([*base, *write_rows(tmp_path / "rows", train, held_out)])
    texts = {one.name: (one.text, one.rows) for _, one in done.found}
    assert "row 3 (as row 1)" in texts["duplicates"][0]
    assert "eval row 2 asks what train row 2 asks" in texts["overlap"][0]
    assert texts["overlap"][1] == [2]
    assert not done.failed


def test_a_policy_makes_a_finding_a_fault(base, tmp_path):
    words = [*base, *write_rows(tmp_path / "rows", [PLAIN, PLAIN])]
    assert not check(words).failed
    assert check([*words, "check.policy.duplicates=fail"]).failed


def test_rows_that_are_all_cut_are_found(base, tmp_path):
    # z z | q x 9 and a stop token: 12 tokens, cut at 6
    rows = [{"prompt": "zz", "completion": "q" * 9}] * 2
    limits = ["dataset.too_long=truncate", "trainer.max_length=6"]
    text, numbers = found([*base, *write_rows(tmp_path / "rows", rows), *limits], "truncated")[0]
    assert text.startswith("train: 100% of sequences are cut at trainer.max_length=6")
    assert numbers == [1, 2]


def test_rows_of_which_none_fits_are_a_fault_that_ends_the_check_of_all_that_needs_them(base, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows", [{"prompt": "zz", "completion": "q" * 9}])
    assert found([*base, *rows, "trainer.max_length=6"], "data")[0][0].startswith("No train row fits into")
    assert "not checked: it needs rows and a tokenizer" in capsys.readouterr().out


def test_two_beginnings_are_found(tmp_path):
    model = save_tiny(tmp_path / "model", "llama", adds_bos=True)
    rows = write_rows(tmp_path / "rows", [{"text": "zz"}, {"text": "<|bos|>zz"}])
    text, numbers = found([f"model.name_or_path={model}", *rows], "double_bos")[0]
    assert "50.0% of sequences start with two" in text
    assert numbers == [2]


def test_a_template_whose_prompt_is_written_otherwise_is_shown(base, tmp_path, capsys):
    other = TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><|tool|>' }}")
    chat = {"messages": [{"role": "user", "content": "zz"}, {"role": "assistant", "content": "q"}]}
    rows = [{"prompt": chat["messages"][:1], "completion": chat["messages"][1:]}]
    words = [*base, *write_rows(tmp_path / "rows", rows), with_template(other, tmp_path)]
    assert found(words, "prompt_differs")[0][1] == [1]
    assert "<|assistant|><|tool|>', and trained on as" in capsys.readouterr().out


def test_a_template_without_marks_cannot_teach_the_assistant_alone(base, tmp_path):
    bare = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    rows = [{"messages": [{"role": "user", "content": "zz"}, {"role": "assistant", "content": "q"}]}]
    words = [
        *base,
        *write_rows(tmp_path / "rows", rows),
        with_template(bare, tmp_path),
        "trainer.assistant_only_loss=true",
    ]
    done = check(words)
    assert done.failed
    assert "no_generation_markers" in {one.name for _, one in done.found}


def test_what_a_template_does_not_write_is_named(base, tmp_path):
    call = {"type": "function", "function": {"name": "add_up", "arguments": {"a": 1}}}
    rows = [{"messages": [
        {"role": "user", "content": "zz"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"}, {"role": "assistant", "content": "q"},
    ]}]  # fmt: skip
    text, numbers = found([*base, *write_rows(tmp_path / "rows", rows)], "left_out")[0]
    assert "never sees: add_up" in text
    assert numbers == [1]


# ---------------------------------------------------------------- what the model sees


def test_what_is_learnt_stands_between_brackets(base, tmp_path, capsys):
    check([*base, *write_rows(tmp_path / "rows", [PLAIN])])
    out = capsys.readouterr().out
    assert "row 1: th[[zq<|eos|>]]" in out
    assert "\033[" not in out


@pytest.mark.parametrize(("no_color", "shown"), [(None, "th\033[7;32mzq<|eos|>\033[0m"), ("1", "th[[zq<|eos|>]]")])
def test_a_terminal_gets_colours_unless_it_wants_none(no_color, shown, base, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    check([*base, *write_rows(tmp_path / "rows", [PLAIN])])
    assert f"row 1: {shown}" in capsys.readouterr().out


def test_both_sides_of_a_preference_are_shown(base, tmp_path, capsys):
    rows = [{"prompt": "th", "chosen": "zq", "rejected": "q"}]
    check(["trainer=dpo", *base, *write_rows(tmp_path / "rows", rows)])
    out = capsys.readouterr().out
    assert "row 1 chosen: th[[zq<|eos|>]]" in out
    assert "row 1 rejected: th[[q<|eos|>]]" in out


def test_rewards_are_asked_of_the_reference_and_of_an_empty_answer(base, tmp_path, capsys):
    rows = [{"prompt": "1 + 1 =", "answer": "2"}] * 8
    words = [*base, *write_rows(tmp_path / "rows", rows), "trainer=grpo", "reward=sum"]
    done = check(words)
    assert done.facts["view"]["rewards"]["right"] == {"the reference": 1.0, "an empty answer": 0.0}
    assert "columns that rewards get: answer" in capsys.readouterr().out


def test_a_reward_that_cannot_tell_the_reference_from_nothing_is_found(base, tmp_path):
    rows = [{"prompt": "a", "answer": "b"}] * 8
    words = [*base, *write_rows(tmp_path / "rows", rows), "trainer=grpo", "reward=format"]
    assert "to the reference and to an empty answer" in found(words, "reward_blind")[0][0]


def test_a_reward_model_is_counted_and_not_asked(base, neox_dir, tmp_path, capsys):
    # The value model is copied from it, for it has the policy's vocabulary, of 293 tokens: 32 numbers each; in both
    # layers qkv 33 x 96, dense 33 x 32, inner 33 x 64 and 65 x 32, norms 4 x 32; a last norm, 2 x 32, and a score, 32.
    rows = [{"prompt": "a", "completion": "b"}] * 40
    done = check([
        *base, *write_rows(tmp_path / "rows", rows), "trainer=ppo", "trainer.value_mode=separate", "reward=model",
        "model@reward.model=pythia160m", f"reward.model.name_or_path={neox_dir}",
    ])  # fmt: skip
    assert not done.failed
    assert "its weights are not read" in capsys.readouterr().out
    assert done.copies["reward.model"] > 0
    layer = 33 * 96 + 33 * 32 + 33 * 64 + 65 * 32 + 4 * 32
    assert done.model.by_module["value function"] == 293 * 32 + 2 * layer + 2 * 32 + 32


# ---------------------------------------------------------------- config, plan, model, output


def test_what_differs_and_what_has_no_effect_is_said(base, tmp_path):
    words = [*base, *write_rows(tmp_path / "rows", [PLAIN]), "trainer.max_steps=5", "trainer.num_train_epochs=3"]
    done = check(words)
    assert done.facts["config"]["changed"]["trainer.max_steps"] == {"value": 5, "files": -1}
    assert [one.text for _, one in done.found if one.name == "no_effect"] == [
        "trainer.num_train_epochs has no effect: trainer.max_steps is set."
    ]


def test_steps_and_tokens_are_counted(base, tmp_path):
    # t h z q eos: th is one token, so 4 a row; 10 rows in batches of 4 are 3 batches, 2 of them a step: 2 steps an
    # epoch, 6 in 3 epochs, of 8 rows or 32 tokens; saved every 4 steps and at the end: 2; evaluated never
    rows = [{"prompt": "th", "completion": f"z{c}"} for c in "abcdefghij"]
    done = check([
        *base, *write_rows(tmp_path / "rows", rows), "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=2", "trainer.num_train_epochs=3", "trainer.save_steps=4",
    ])  # fmt: skip
    plan = done.plan
    assert (plan.steps, plan.epochs, plan.sequences, plan.checkpoints, plan.evaluations) == (6, 3.0, 8, 2, 0)
    assert (plan.tokens_per_step, plan.tokens) == (32, 192)


@pytest.mark.parametrize(
    "launch",
    [
        ["launch=fsdp2", "launch.processes=8"],
        ["launch=ddp", "launch.processes=2", "launch.nodes=4", "launch.rendezvous=a:1"],
    ],
)
def test_a_plan_counts_the_processes_and_what_each_holds(launch, base, tmp_path):
    # 64 rows, in steps of 4 rows x 8 processes: 2 steps; FSDP2 gives each an eighth of the optimizer's states
    words = [*base, *write_rows(tmp_path / "rows", [PLAIN] * 64), "trainer.num_train_epochs=1"]
    words += ["trainer.per_device_train_batch_size=4", "peft=none"]
    alone, done = check(words), check([*words, *launch])
    assert (alone.plan.steps, done.plan.steps, done.plan.sequences, done.processes) == (16, 2, 32, 8)
    one, part = alone.facts["memory"], done.facts["memory"]
    parts = 8 if "launch=fsdp2" in launch else 1
    assert part["optimizer"] == pytest.approx(one["optimizer"] / parts, abs=1)
    assert part["gradients"] == pytest.approx(one["gradients"] / parts, abs=1)
    assert part["activations"] == one["activations"]
    assert ("cannot run on a CPU" in str(done.found)) == (parts == 8)
    assert not done.failed  # another machine may have what this one lacks


def test_a_plan_of_several_processes_keeps_the_global_batch(base, tmp_path):
    words = [*base, *write_rows(tmp_path / "rows", [{"prompt": "1 + 1 =", "answer": "2"}] * 64), "trainer=grpo"]
    words += ["trainer.num_generations=2", "trainer.per_device_train_batch_size=4", "launch=ddp", "launch.processes=4"]
    done = check([*words, "global_batch_size=32"])
    assert (done.plan.sequences, done.arguments.gradient_accumulation_steps) == (32, 2)
    assert done.arguments.generation_batch_size == 4 * 4 * 2


def test_a_whole_check_is_written_as_json(base, tmp_path, capsys):
    words = write_rows(tmp_path / "rows", [PLAIN], [{"prompt": "in", "completion": "z"}])
    check([*base, *words, f"check.json={tmp_path / 'check.json'}"])
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["resolved"]["peft"]["r"] == 16
    assert told["memory"]["peak"] > told["memory"]["weights"] > 0
    # LoRA of rank 16 on two layers of 32 wide, 16 for keys and values, 64 inside: 16 x (32 + out) or (64 + 32)
    # q, o: 16 x 64 x 2; k, v: 16 x 48 x 2; gate, up: 16 x 96 x 2; down: 16 x 96; twice
    assert told["model"]["trainable"] == 2 * 16 * (64 * 2 + 48 * 2 + 96 * 2 + 96)
    assert told["plan"]["evaluations"] == 2
    assert "to correct" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sft", "grpo", "ppo"])
def test_a_probe_takes_steps_with_the_weights(trainer, base, tmp_path):
    rows = [{"prompt": "th", "completion": "z" * n} for n in range(1, 9)]
    words = write_rows(tmp_path / "rows", rows, [{"prompt": "in", "completion": "z"}])
    online = ["reward=unique_chars", "trainer.max_completion_length=4"] if trainer != "sft" else []
    online += ["trainer.num_generations=2"] if trainer == "grpo" else []
    small = ["check.probe=true", "trainer.per_device_train_batch_size=2", "trainer.warmup_steps=0"]
    done = check([f"trainer={trainer}", *base, *words, *small, *online, "trainer.learning_rate=1e-2"])
    probe = done.facts["probe"]
    assert probe["step_seconds"] > 0
    assert probe["training_seconds"] == pytest.approx(done.plan.steps * probe["step_seconds"])
    assert not (tmp_path / "rows" / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.lr_scheduler_type=reduce_lr_on_plateau", "trainer.eval_strategy=epoch"],
        ["trainer.load_best_model_at_end=true", "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch"],
    ],
)
def test_a_probe_needs_no_evaluation_in_between_and_takes_the_steps_of_the_plan(words, base, tmp_path, monkeypatch):
    passes = []
    step = transformers.Trainer.training_step
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *a, **k: passes.append(0) or step(*a, **k))
    peak = manifest.peak_memory

    def beside_a_gpu():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return peak()

    monkeypatch.setattr(manifest, "peak_memory", beside_a_gpu)
    rows = write_rows(tmp_path / "rows", [{"prompt": "th", "completion": "z"}] * 16, [PLAIN])
    small = ["check.probe=true", "trainer.per_device_train_batch_size=2", "global_batch_size=8", "trainer.use_cpu=true"]
    done = check([*base, *rows, *small, *words, "trainer.learning_rate=1e-2", "trainer.warmup_steps=0"])
    assert not done.failed, done.found
    assert len(passes) == 2 * 4  # two steps, each of 8 rows in passes of 2
    assert done.facts["probe"]["peak_bytes"] > 1e8


@pytest.mark.slow
def test_a_guard_that_ends_a_probe_is_a_finding(base, tmp_path):
    rows = write_rows(tmp_path / "rows", [{"prompt": "th", "completion": "z"}] * 16)
    wild = ["peft=none", "trainer.learning_rate=1e20", "trainer.max_grad_norm=0", "trainer.warmup_steps=0"]
    assert "not finite" in found([*base, *rows, *wild, "check.probe=true"], "probe")[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "more"),
    [("sft", ["trainer.packing=true", "trainer.max_length=16"]), ("grpo", ["trainer.num_generations=2"]),
     ("ppo", ["trainer.total_episodes=null", "trainer.num_mini_batches=1"])],
)  # fmt: skip
def test_a_run_has_the_steps_and_parameters_that_a_check_foresees(trainer, more, base, tmp_path):
    rows = [{"prompt": "th", "completion": "z" * (n % 5 + 1), "answer": "z"} for n in range(12)]
    online = ["reward=unique_chars", "trainer.max_completion_length=4"] if trainer != "sft" else []
    words = [
        f"trainer={trainer}", *base, *write_rows(tmp_path / "rows", rows), *online, *more, "trainer.max_steps=-1",
        "trainer.per_device_train_batch_size=4", "trainer.save_steps=2", "trainer.save_total_limit=null",
        "trainer.learning_rate=1e-2",
    ]  # fmt: skip
    done = check(words)
    composed = compose.compose(words)
    run_dir = compose.claim(composed.run_dir)
    write_run(run_dir, composed.config, composed.choices, words)
    run(run_dir)
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    record = manifest.read(run_dir)
    assert done.plan.steps == max(steps) == record["plan"]["steps"]
    foreseen = {name: size for name, size in done.facts["memory"].items() if name in record["memory"]}
    assert record["memory"] == foreseen
    assert set(foreseen) >= {"weights", "activations", "peak"}
    assert done.plan.checkpoints == len(list((run_dir / "checkpoints").glob("checkpoint-*")))
    assert done.model.parameters == record["parameters"]
    assert done.model.trainable == record["trainable_parameters"]
    assert record["speed"]["seconds_per_step"] > 0
    assert {one["name"] for one in record["findings"]} == {"duplicates"}


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("recipe", option_names("experiment"))
def test_every_recipe_is_checked_without_the_hub(recipe, tmp_path, capsys):
    done = check([f"experiment={recipe}", "check.reach=false", f"output_dir={tmp_path}", "model.name_or_path=no/such"])
    assert not done.failed
    assert "the hub is not asked" in capsys.readouterr().out


def test_a_recipe_and_an_option_of_ones_own_are_checked_as_any_other(llama_dir, tmp_path):
    for name, text in {
        "model/mine.yaml": f"name_or_path: {llama_dir}",
        "experiment/mine.yaml": "# @package _global_\ndefaults: [{override /model: mine}]\nseed: 7",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    done = check([f"--config-dir={tmp_path}", "experiment=mine", *write_rows(tmp_path / "rows", [PLAIN])])
    assert not done.failed
    assert "model.name_or_path" not in done.facts["config"]["changed"]
    assert done.facts["config"]["changed"]["seed"] == {"value": 7, "files": 42}


def test_a_value_model_that_is_not_asked_for_is_passed_over(base, tmp_path, capsys):
    words = [*base, *write_rows(tmp_path / "rows", [PLAIN] * 32), "trainer=ppo", "peft=none", "reward=unique_chars"]
    done = check([*words, "model@value_model=pythia160m", "value_model.name_or_path=no/such", "check.reach=false"])
    assert not done.failed
    assert "not checked: value_model.name_or_path cannot be read from here" in capsys.readouterr().out


def test_a_section_has_a_policy_too(base, tmp_path):
    done = check(["model.name_or_path=no/such", *write_rows(tmp_path / "rows", [PLAIN]), "check.policy.reach=warn"])
    assert [(policy, one.name) for policy, one in done.found if one.name == "reach"] == [("warn", "reach")]
    assert not done.failed


def test_a_model_that_is_not_here_is_a_fault_when_the_hub_does_not_answer(tmp_path):
    words = ["model.name_or_path=no/such", *write_rows(tmp_path / "rows", [PLAIN])]
    assert "no/such cannot be loaded" in found(words, "reach")[0][0]


def test_weights_that_end_early_are_a_fault(llama_dir, tmp_path):
    model = save_tiny(tmp_path / "model", "llama")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    words = [f"model.name_or_path={model}", *write_rows(tmp_path / "rows", [PLAIN])]
    assert "damaged or incomplete" in found(words, "reach")[0][0]


def test_a_place_that_cannot_be_written_to_is_a_fault(base, tmp_path):
    (tmp_path / "file").touch()
    words = write_rows(tmp_path / "rows", [PLAIN])[:-1]
    assert "cannot be made" in found([*base, *words, f"output_dir={tmp_path / 'file' / 'run'}"], "reach")[0][0]


def test_a_tracker_that_is_not_installed_is_a_fault(base, tmp_path):
    words = [*base, *write_rows(tmp_path / "rows", [PLAIN]), "trainer.report_to=clearml"]
    assert "pip install clearml" in found(words, "trackers")[0][0]


WRONG = {  # ten kinds of misspelt or misplaced keys, and the path that is right
    "trainer.learning_rat=1": "trainer.learning_rate",
    "learning_rate=1": "trainer.learning_rate",
    "trainer.evaluation_strategy=steps": "trainer.eval_strategy",
    "trainer.lora_alpha=3": "peft.lora_alpha",
    "trainer.beta=0.1": "trainer=dpo",
    "modle=qwen0.5b": "model=",
    "model=qwen05b": "model=qwen0.5b",
    "dataset.max_vlue=3": "dataset.max_value",
    "hydra.run.dri=x": "hydra.run.dir",
    "samples.max_length=3": "trainer.max_length",
}


@pytest.mark.parametrize(("word", "path"), WRONG.items())
def test_a_wrong_key_names_the_right_one(word, path):
    with pytest.raises(ConfigError) as error:
        check([word])
    assert path in str(error.value)


@pytest.mark.parametrize("word", [word for word in WRONG if "." in word.split("=")[0]])
def test_a_wrong_key_in_a_recipe_names_the_right_one(word, tmp_path):
    key, _, value = word.partition("=")
    *parents, last = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(parents)] + [f"{'  ' * len(parents)}{last}: {value}"]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + "\n".join(lines) + "\n")
    with pytest.raises(ConfigError) as error:
        check(["experiment=mine", f"--config-dir={tmp_path}"])
    assert WRONG[word] in str(error.value)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("check.jsn=a", "did you mean json?"),
        ("check.probe=yes", "takes true or false"),
        ("check.json=no/such/check.json", "there is no folder no/such"),
        ("check.policy.overlp=fail", "did you mean overlap?"),
        ("check.policy.overlap=stop", "takes warn or fail"),
    ],
)
def test_a_wrong_word_of_the_check_is_refused(word, answer):
    with pytest.raises(ConfigError, match=answer.replace("?", r"\?")):
        read_options([word])


def test_faults_end_with_exit_code_2_and_no_traceback():
    code, said = command("trainer.bta=1", "dataset.max_value=many", module="runner.check")
    assert code == 2
    assert "2 faults" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_run_may_be_probed_first_but_not_a_sweep(base, tmp_path):
    words = [*base, "trainer.max_steps=2", "dataset.train_rows=32", "dataset.eval_rows=4", "probe=true"]
    code, said = command(*words, f"output_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert code == 0, said
    assert said.index("a step") < said.index("trained 2 steps")
    with pytest.raises(ConfigError, match="probe=true looks at one run"):
        prepare(["-m", *words, "seed=1,2"])
