import pytest

from runner import formats
from runner.errors import ConfigError
from runner.formats import convert, names, produces, recognise
from runner.rows import BadRow, validate


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"

# One raw row of every format, and the canonical row that it becomes.
ROWS = {
    "text": ({"text": " Once.", "url": "u"}, {"text": " Once.", "url": "u"}),
    "messages": (
        {"messages": [user("Hi"), assistant("Hello")], "source": "s"},
        {"messages": [user("Hi"), assistant("Hello")], "source": "s"},
    ),
    "prompt_completion": ({"prompt": "TL;DR:", "completion": " Short."}, {"prompt": "TL;DR:", "completion": " Short."}),
    "preference": (
        {"prompt": "p", "chosen": " c", "rejected": " r", "score": 1},
        {"prompt": "p", "chosen": " c", "rejected": " r", "score": 1},
    ),
    "preference_implicit": (
        {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")], "score_chosen": 8.5},
        {"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")], "score_chosen": 8.5},
    ),
    "preference_unprompted": ({"chosen": "Fine.", "rejected": "Bad."}, {"chosen": "Fine.", "rejected": "Bad."}),
    "unpaired": (
        {"prompt": "p", "completion": "c", "label": "False"},
        {"prompt": "p", "completion": "c", "label": False},
    ),
    "prompt_only": ({"prompt": [user("q")], "answer": ["B"]}, {"prompt": [user("q")], "answer": ["B"]}),
    "alpaca": (
        {"instruction": "Translate.", "input": "Haus", "output": "house"},
        {"prompt": [user("Translate.\n\nHaus")], "completion": [assistant("house")]},
    ),
    "sharegpt": (
        {"id": "7", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "7", "messages": [user("Hi"), assistant("Hello")]},
    ),
    "firefly": (
        {"kind": "QA", "input": "你是谁", "target": "助手。"},
        {"kind": "QA", "prompt": [user("你是谁")], "completion": [assistant("助手。")]},
    ),
    "hh": (
        {"chosen": HH + " 4.", "rejected": HH + " 5."},
        {
            "prompt": [user("Hi."), assistant("Hello."), user("2+2?")],
            "chosen": [assistant("4.")],
            "rejected": [assistant("5.")],
        },
    ),
    "gsm8k": (
        {"question": "How much?", "answer": "600*2=<<600*2=1200>>1200\n#### 1,200"},
        {
            "prompt": [user("How much?")],
            "completion": [assistant("600*2=<<600*2=1200>>1200\n#### 1,200")],
            "answer": "1200",
        },
    ),
}


def test_every_format_has_a_sample_here():
    assert set(names()) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_raw_row_becomes_its_canonical_row(name):
    raw, canonical = ROWS[name]
    assert convert(name, raw) == canonical


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_recognised_as_itself_alone(name):
    raw, _ = ROWS[name]
    assert recognise(set(raw), raw) == name


@pytest.mark.parametrize("name", ROWS)
def test_a_format_produces_the_columns_it_promises(name):
    raw, _ = ROWS[name]
    assert produces(name) <= convert(name, raw).keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_function_leaves_its_input_as_it_was(name):
    raw, _ = ROWS[name]
    before = repr(raw)
    convert(name, raw)
    assert repr(raw) == before


# --- recognition


def test_two_fitting_formats_are_refused_and_both_named():
    row = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"}
    with pytest.raises(ConfigError, match=r"prompt_completion and preference.*dataset\.format=prompt_completion"):
        recognise(set(row), row)


def test_unknown_columns_are_refused_with_what_was_seen_and_what_to_type():
    row = {"title": "t", "body": "b"}
    with pytest.raises(ConfigError, match=r"\['body', 'title'\].*fit none of.*dataset\.rename="):
        recognise(set(row), row)


def test_stepwise_rows_are_refused_by_name():
    row = {"prompt": "p", "completions": ["a"], "labels": [True]}
    with pytest.raises(ConfigError, match="stepwise"):
        recognise(set(row), row)


def test_messages_under_the_name_conversations_are_refused_with_the_rename():
    row = {"conversations": [user("a"), assistant("b")]}
    with pytest.raises(ConfigError, match=r"rename='\{conversations: messages\}'"):
        recognise(set(row), row)


def test_question_and_answer_without_final_number_is_no_gsm8k():
    row = {"question": "Capital of France?", "answer": "Paris"}
    with pytest.raises(ConfigError, match="fit none"):
        recognise(set(row), row)


def test_the_rendered_text_of_alpaca_does_not_hide_its_format():
    row = {"instruction": "Add.", "input": "", "output": "Done.", "text": "Below ... Add. ### Response: Done."}
    assert recognise(set(row), row) == "alpaca"
    row["text"] = "Something else."
    with pytest.raises(ConfigError, match="text and alpaca"):
        recognise(set(row), row)


def test_a_prompt_and_messages_that_conversations_repeat_do_not_hide_their_format():
    chosen, rejected = [user("q"), assistant("c")], [user("q"), assistant("r")]
    row = {"prompt": "q", "messages": chosen, "chosen": chosen, "rejected": rejected}
    assert recognise(set(row), row) == "preference_implicit"
    assert convert("preference_implicit", row) == {
        "prompt": [user("q")],
        "chosen": [assistant("c")],
        "rejected": [assistant("r")],
    }
    with pytest.raises(BadRow, match="chosen repeats the prompt"):
        convert("preference", row)


def test_an_unknown_format_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"dataset\.format=alpacca.*auto, text.*gsm8k"):
        produces("alpacca")


# --- values that look right and are not


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_an_alpaca_instruction_without_input_stands_alone(empty):
    row = {"instruction": "Sing.", "input": empty, "output": "La."}
    assert convert("alpaca", row)["prompt"] == [user("Sing.")]


def test_the_leading_space_of_a_completion_is_kept():
    assert convert("prompt_completion", {"prompt": "p", "completion": " c"})["completion"] == " c"


@pytest.mark.parametrize(
    ("label", "parsed"),
    [
        *[(True, True), ("true", True), ("yes", True), ("1", True), (1, True), (1.0, True)],
        *[(False, False), ("FALSE", False), (" no ", False), ("0", False), (0, False), (0.0, False)],
    ],
)
def test_labels_are_parsed_not_truth_tested(label, parsed):
    assert convert("unpaired", {"prompt": "p", "completion": "c", "label": label})["label"] is parsed


@pytest.mark.parametrize("label", [None, "", "good", 2, -1, float("nan"), [True]])
def test_other_labels_are_refused(label):
    with pytest.raises(BadRow, match=r"^label "):
        convert("unpaired", {"prompt": "p", "completion": "c", "label": label})


def test_a_label_beside_a_prompt_alone_is_a_rewards_business():
    assert convert("prompt_only", {"prompt": "p", "label": "spam"}) == {"prompt": "p", "label": "spam"}


def test_tool_calls_become_what_chat_templates_read():
    chat = [user("1+2?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    chat += [{"role": "tool", "tool_call_id": "c1", "content": "3"}, {**assistant("3"), "tool_calls": None}]
    row = convert("messages", {"messages": chat, "tools": [TOOL]})
    # Arguments as an object, not as a JSON string; content never null; keys that Arrow filled with null gone.
    call = row["messages"][1]["tool_calls"][0]
    assert call == {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    assert row["messages"][1]["content"] == ""
    assert row["messages"][2] == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert row["messages"][3] == assistant("3")
    assert row["tools"] == [TOOL]


def test_tools_are_read_from_json_text_and_without_arrows_nulls():
    chat = [user("a"), assistant("b")]
    described = {"type": "function", "function": {"name": "add", "strict": None}}
    expected = [{"type": "function", "function": {"name": "add"}}]
    assert convert("messages", {"messages": chat, "tools": [described]})["tools"] == expected
    as_text = '[{"type": "function", "function": {"name": "add"}}]'
    assert convert("messages", {"messages": chat, "tools": as_text})["tools"] == expected
    assert "tools" not in convert("messages", {"messages": chat, "tools": None})
    with pytest.raises(BadRow, match=r"^tools "):
        convert("messages", {"messages": chat, "tools": "add(a, b)"})


def test_text_parts_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert convert("prompt_only", {"prompt": [{"role": "user", "content": parts}]})["prompt"] == [user("ab")]
    parts.append({"type": "image_url", "image_url": {"url": "u"}})
    with pytest.raises(BadRow, match="part that is not text"):
        convert("prompt_only", {"prompt": [{"role": "user", "content": parts}]})


def test_sharegpt_speaks_in_systems_and_tools_too():
    turns = [
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3."},
    ]
    chat = convert("sharegpt", {"conversations": turns, "system": "Be brief."})["messages"]
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat[2]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    ("speakers", "reason"),
    [
        (["gpt", "human", "gpt"], "starts with gpt"),
        (["system", "gpt"], "starts with system"),
        (["human", "gpt", "human"], "ends with human"),
        (["human", "human", "gpt"], "user a second time in a row"),
        (["human", "gpt", "gpt"], "assistant a second time in a row"),
        (["human", "alien"], "speaker 'alien'"),
        ([], "not a list of turns"),
    ],
)
def test_cut_sharegpt_conversations_are_refused(speakers, reason):
    turns = [{"from": speaker, "value": "x"} for speaker in speakers]
    with pytest.raises(BadRow, match=reason):
        convert("sharegpt", {"conversations": turns})


@pytest.mark.parametrize(
    ("chosen", "rejected", "field"),
    [
        (HH + " 4.\n\nHuman: Thanks.", HH + " 5.", "chosen"),  # ends with the human
        (HH + " 4.", HH.replace("2+2", "3+3") + " 5.", "rejected"),  # another question
        (HH + " 4.", HH + " 5.\n\nHuman: No.\n\nAssistant: 4.", "rejected"),  # a longer conversation
        (HH + " 4.", HH, "rejected"),  # an empty answer
        (HH + " 4.", "So.\n\nHuman: Hi.\n\nAssistant: Yes.", "rejected"),  # text before the transcript
        (HH + " 4.", HH + " 4. ", "rejected"),  # the same answer
    ],
)
def test_broken_transcripts_are_refused(chosen, rejected, field):
    with pytest.raises(BadRow) as caught:
        convert("hh", {"chosen": chosen, "rejected": rejected})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("solution", "number"),
    [("x\n#### 18", "18"), ("#### -5", "-5"), ("#### $1,200,000", "1200000"), ("#### 3.5 ", "3.5")],
)
def test_the_final_number_of_gsm8k_is_read(solution, number):
    assert convert("gsm8k", {"question": "q", "answer": solution})["answer"] == number


@pytest.mark.parametrize("solution", ["18", "#### eighteen", "####", None])
def test_gsm8k_without_final_number_is_refused(solution):
    with pytest.raises(BadRow, match=r"^answer "):
        convert("gsm8k", {"question": "q", "answer": solution})


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("a"), assistant("c")], [user("b"), assistant("r")], "rejected does not start with the prompt"),
        ([user("a"), assistant("c")], [user("a"), assistant("c")], "identical"),
        ([user("a")], [user("a"), assistant("r")], "chosen has no answer"),
        ([user("a"), assistant("c")], [user("a"), user("b"), assistant("r")], "rejected has no answer"),
    ],
)
def test_conversations_that_do_not_share_a_prompt_are_refused(chosen, rejected, reason):
    with pytest.raises(BadRow, match=reason):
        convert("preference_implicit", {"chosen": chosen, "rejected": rejected})


def test_the_shared_prompt_may_be_long_and_the_answers_of_several_turns():
    shared = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    chosen = [assistant("d"), user("e"), assistant("f")]
    row = convert("preference_implicit", {"chosen": shared + chosen, "rejected": [*shared, assistant("g")]})
    assert row == {"prompt": shared, "chosen": chosen, "rejected": [assistant("g")]}


# --- validation


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"answer": "4"}, "row", "none of"),
        ({"text": None}, "text", "null"),
        ({"text": " \n"}, "text", "whitespace"),
        ({"text": ""}, "text", "empty"),
        ({"prompt": "p", "completion": 42}, "completion", "type int"),
        ({"completion": "c", "prompt": None}, "prompt", "null"),
        ({"completion": "c", "text": "t"}, "prompt", "missing"),
        ({"prompt": "p", "chosen": "c"}, "rejected", "missing"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "rejected", "identical"),
        ({"prompt": "p", "completion": [assistant("c")]}, "completion", "prompt is text"),
        ({"prompt": [user("p")], "chosen": "c", "rejected": "r"}, "prompt", "chosen is text|rejected is text"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": {"role": "user"}}, "prompt", "type dict"),
        ({"prompt": ["hi"]}, "prompt", "type str"),
        ({"prompt": [{"role": "User", "content": "x"}]}, "prompt", "role 'User'"),
        ({"prompt": [user("")]}, "prompt", "no content"),
        ({"prompt": [{"role": "user"}]}, "prompt", "no content"),
        ({"prompt": [user(["x"])]}, "prompt", "type list"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "prompt", "ends with .* system"),
        ({"prompt": [user("x"), assistant("y")]}, "prompt", "ends with .* assistant"),
        ({"prompt": [user("x")], "completion": [user("y")]}, "completion", "ends with .* user"),
        ({"prompt": [user("x")], "completion": [user("y"), assistant("z")]}, "completion", "starts with"),
        ({"messages": "hi"}, "messages", "type str"),
        ({"messages": [user("x")]}, "messages", "ends with .* user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "ends with .* system"),
        ({"messages": [{"role": "system", "content": "x"}, assistant("y")]}, "messages", "no message of a user"),
        ({"messages": [user("x"), assistant(None)]}, "messages", "no content"),
        ({"prompt": "p", "completion": "c", "label": "yes"}, "label", "not true or false"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_with_field_and_reason(row, field, reason):
    with pytest.raises(BadRow, match=reason) as caught:
        validate(row)
    assert caught.value.field == field
    assert str(caught.value) == f"{field} {caught.value.reason}"


def test_a_tool_may_answer_nothing_and_a_call_needs_no_content():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    validate({"messages": [user("x"), call, {"role": "tool", "content": ""}, assistant("y")]})


def test_a_row_may_serve_several_trainers():
    pair = {"completion": [assistant("4")], "chosen": [assistant("4")], "rejected": [assistant("5")]}
    validate({"prompt": [user("2+2?")], **pair, "answer": "4"})


def test_reasons_name_the_raw_field():
    with pytest.raises(BadRow) as caught:
        formats.firefly({"kind": "QA", "input": "q", "target": None})
    assert (caught.value.field, caught.value.reason) == ("target", "is null")
