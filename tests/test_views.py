import pytest

from runner.errors import ConfigError
from runner.views import refuse_unreadable, row_kind, view


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TEXT = {"text": "t", "source": "s"}
CHAT = {"messages": [user("q"), assistant("a"), user("r"), assistant("b")], "tools": [{"name": "f"}], "id": 7}
PAIR = {"prompt": "p", "completion": "c", "answer": "4"}
PREFERENCE = {"prompt": "p", "chosen": "c", "rejected": "r", "score": 1.0}
UNPROMPTED = {"chosen": "c", "rejected": "r"}
GOOD = {"prompt": "p", "completion": "c", "label": True}
BAD = {"prompt": "q", "completion": "d", "label": False}
PROMPT = {"prompt": "p", "answer": "4"}


@pytest.mark.parametrize(
    ("reads", "row", "expected"),
    [
        ("sft", TEXT, [{"text": "t"}]),
        ("sft", CHAT, [{"messages": CHAT["messages"], "tools": CHAT["tools"]}]),
        ("sft", PAIR, [{"prompt": "p", "completion": "c"}]),
        ("sft", PREFERENCE, [{"prompt": "p", "completion": "c"}]),
        ("sft", UNPROMPTED, [{"text": "c"}]),
        ("sft", GOOD, [{"prompt": "p", "completion": "c"}]),
        ("sft", BAD, []),
        ("preference", PREFERENCE, [{"prompt": "p", "chosen": "c", "rejected": "r"}]),
        ("preference", UNPROMPTED, [UNPROMPTED]),
        ("preference", {**UNPROMPTED, "margin": 0.5}, [{**UNPROMPTED, "margin": 0.5}]),
        ("unpaired", BAD, [BAD]),
        ("unpaired", PREFERENCE, [GOOD, {"prompt": "p", "completion": "r", "label": False}]),
        ("prompt", PROMPT, [PROMPT]),
        ("prompt", PAIR, [{"prompt": "p", "answer": "4", "reference": "c"}]),
        ("prompt", BAD, [{"prompt": "q", "label": False}]),
        ("prompt", PREFERENCE, [PREFERENCE]),
        ("prompt", CHAT, [{"prompt": CHAT["messages"][:3], "tools": CHAT["tools"], "id": 7,
                           "reference": [assistant("b")]}]),
        ("any", CHAT, [CHAT]),
    ],
)  # fmt: skip
def test_a_trainer_gets_what_it_reads(reads, row, expected):
    assert view(reads, [row])[0] == expected


def test_bad_completions_are_not_learnt_and_are_counted():
    rows, skipped = view("sft", [GOOD, BAD, BAD])
    assert len(rows) == 1
    assert skipped == {"label is false": 2}


def test_unpaired_neighbours_have_different_prompts():
    # TRL pairs each prompt with its neighbour's completion for the KL term
    rows, _ = view("unpaired", [{**PREFERENCE, "prompt": name} for name in "abc"])
    assert [row["prompt"] for row in rows] == list("abcabc")
    assert [row["label"] for row in rows] == [True] * 3 + [False] * 3


def test_a_prompt_ends_before_the_last_answer_also_when_that_used_a_tool():
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    told = {"role": "tool", "content": "4"}
    messages = [user("q"), called, told, assistant("a"), assistant("b")]
    assert view("prompt", [{"messages": messages}])[0][0]["prompt"] == messages[:3]


def test_names_that_online_trainers_use_are_not_handed_to_rewards():
    row = {**PROMPT, "completions": ["x"], "trainer_state": 1, "image": None, "environment": "e"}
    assert view("prompt", [row])[0] == [PROMPT]


@pytest.mark.parametrize(
    ("trainer", "reads"),
    [("sft", "sft"), ("dpo", "preference"), ("reward", "preference"), ("orpo", "preference"), ("cpo", "preference"),
     ("kto", "unpaired"), ("grpo", "prompt"), ("rloo", "prompt"), ("ppo", "prompt"), ("distillation", "any")],
)  # fmt: skip
def test_every_trainer_has_a_kind_of_row(trainer, reads):
    assert row_kind(trainer) == reads


@pytest.mark.parametrize(
    ("reads", "row"),
    [("sft", PROMPT), ("preference", PAIR), ("preference", GOOD), ("unpaired", PAIR), ("unpaired", UNPROMPTED),
     ("prompt", TEXT), ("prompt", UNPROMPTED)],
)  # fmt: skip
def test_rows_that_cannot_serve_a_trainer_are_refused(reads, row):
    with pytest.raises(ConfigError):
        refuse_unreadable(reads, row.keys(), dataset="mine")


def test_the_refusal_says_what_is_lacking_and_what_to_choose():
    with pytest.raises(ConfigError) as caught:
        refuse_unreadable("preference", {"prompt", "completion"}, dataset="gsm8k", trainer="dpo")
    assert str(caught.value) == (
        "trainer=dpo cannot read dataset=gsm8k: rows lack ['chosen', 'rejected'], have ['completion', 'prompt']. "
        "Choose a dataset with ['chosen', 'rejected'], for example dataset=ultrafeedback, or another trainer."
    )
