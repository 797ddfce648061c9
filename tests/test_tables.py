import json

import pytest

from runner.tables import interleave, make_features, make_table


def table(*rows):
    return make_table(rows, make_features(rows))


def chat(**extra):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", **extra}]


def test_messages_come_back_as_they_were_without_keys_filled_with_null():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 3.141592653589793, "y": None, "z": 1e-12}}}
    rows = [{"messages": chat(tool_calls=[call])}, {"messages": chat()}]
    assert table(*rows).to_list() == rows


def test_a_trainer_s_map_leaves_messages_as_they_were():
    rows = [{"messages": chat(tool_calls=[{"function": {"name": "f", "arguments": {"x": [1, "a"]}}}])}]
    mapped = table(*rows).map(lambda row: {"n": len(row["messages"])})
    assert mapped[0] == {**rows[0], "n": 2}


def test_tools_are_json_text_which_trl_decodes():
    tools = [{"name": "f", "parameters": {"a": {"default": None}}}]
    made = table({"prompt": "a", "tools": tools}, {"prompt": "b"})
    assert json.loads(made[0]["tools"]) == tools
    assert made[1]["tools"] is None


def test_template_options_are_never_null():
    # TRL unpacks them
    assert table({"chat_template_kwargs": {"think": False}}, {"text": "a"})[1]["chat_template_kwargs"] == {}


@pytest.mark.parametrize(
    "values",
    [["12", 12, None], ["a", ["b"]], [{"a": 1}, {"b": "12"}], [[1], [[2]]], [1, 2.5], [True, False], [["a"], []]],
    ids=str,
)
def test_a_column_for_rewards_keeps_its_values(values):
    assert table(*({"answer": value} for value in values))["answer"] == values


def test_plain_chats_are_structs():
    from datasets import List, Value

    assert table({"prompt": [{"role": "user", "content": "q"}]}).features["prompt"] == List(
        {"role": Value("string"), "content": Value("string")}
    )


def test_large_tables_are_made_in_chunks_and_keep_their_order(monkeypatch):
    monkeypatch.setattr("runner.tables.CHUNK_ROWS", 3)
    assert table(*({"text": str(n)} for n in range(10)))["text"] == [str(n) for n in range(10)]


def test_weights_decide_how_often_a_source_is_drawn():
    tables = {name: table(*({"text": name} for _ in range(4000))) for name in "ab"}
    mixed, drawn = interleave(tables, {"a": 3.0, "b": 1.0}, seed=0, stopping_strategy="first_exhausted")
    # a runs out after about 4000 / 0.75 = 5333 draws
    assert drawn["a"] == 4000
    assert drawn["a"] / len(mixed) == pytest.approx(0.75, abs=0.02)
    assert drawn == {name: list(mixed["text"]).count(name) for name in "ab"}


def test_the_seed_decides_the_order():
    tables = {name: table(*({"text": f"{name}{n}"} for n in range(50))) for name in "ab"}

    def order(seed):
        return list(interleave(tables, {"a": 1, "b": 1}, seed=seed, stopping_strategy="all_exhausted")[0]["text"])

    assert order(1) == order(1) != order(2)
    assert set(order(1)) == {f"{name}{n}" for name in "ab" for n in range(50)}
