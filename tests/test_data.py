import json
import logging

import pytest

from runner.data import load_splits
from runner.errors import ConfigError


def chat(question, answer):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(reads="sft", **options):
    return load_splits(reads=reads, run_seed=0, **options)


def refusal(reads="sft", **options):
    with pytest.raises(ConfigError) as caught:
        load(reads, **options)
    return str(caught.value)


@pytest.fixture
def sums(tmp_path):
    return {
        "path": write(
            tmp_path / "sums.jsonl", [{**chat(f"{n} + 1", str(n + 1)), "answer": str(n + 1)} for n in range(30)]
        )
    }


@pytest.fixture
def words(tmp_path):
    return {"path": write(tmp_path / "words.jsonl", [chat(f"word {n}", "x" * n) for n in range(1, 31)])}


def test_one_dataset_gives_tables_held_out_rows_and_a_report(sums):
    splits = load(**sums, train="train[:20]", eval="train[20:]")
    assert splits.train.column_names == ["prompt", "completion"]
    assert [len(splits.train), len(splits.eval)] == [20, 10]
    assert splits.held_out[0] == {**chat("20 + 1", "21"), "answer": "21"}
    assert splits.report["train"]["rows"] == 20
    assert splits.report["eval"]["split"] == "train[20:]"


def test_without_eval_there_is_none(sums):
    splits = load(**sums)
    assert splits.eval is None
    assert splits.held_out == []


def test_a_whole_node_can_be_passed(sums):
    assert len(load(**sums, too_long="fail", weight=2.0, bad_rows="fail", rename={}, name=None).train) == 30


def test_one_dataset_serves_every_kind_of_trainer():
    node = {"generator": "arithmetic", "train_rows": 5, "eval_rows": 2, "max_value": 9, "eval": "validation"}
    columns = {reads: load(reads, **node).train.column_names for reads in ("sft", "preference", "unpaired", "prompt")}
    assert columns["sft"] == ["prompt", "completion"]
    assert columns["preference"] == ["prompt", "chosen", "rejected"]
    assert columns["unpaired"] == ["prompt", "completion", "label"]
    assert set(columns["prompt"]) == {"prompt", "answer", "chosen", "rejected", "reference"}
    assert len(load("unpaired", **node).train) == 10  # each row twice: chosen and rejected


def test_chats_with_tools_survive_on_their_way_to_the_chat_template(tmp_path):
    tools = [
        {"type": "function", "function": {"name": "tip", "parameters": {"properties": {"bill": {"type": "number"}}}}}
    ]
    call = {"type": "function", "function": {"name": "tip", "arguments": {"bill": 50}}}
    messages = [
        {"role": "user", "content": "Tip on 50?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"tip": 7.5}'},
        {"role": "assistant", "content": "7.5"},
    ]
    plain = {"messages": [messages[0], messages[3]]}
    train = load(path=write(tmp_path / "rows.jsonl", [{"messages": messages, "tools": tools}, plain])).train
    assert train[0]["messages"] == messages
    assert json.loads(train[0]["tools"]) == tools
    assert train[1] == {**plain, "tools": None}


def test_text_and_messages_in_train_and_eval_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", [chat("a", "b")])
    write(tmp_path / "validation.jsonl", [{"prompt": "a", "completion": "b"}])
    message = refusal(path=str(tmp_path), eval="validation")
    assert "prompt is messages in train, text in eval" in message


def test_sources_are_mixed_by_weight_and_each_is_reported(sums, words):
    splits = load(
        sources={
            "sums": {**sums, "eval": "train[:2]", "weight": 1},
            "words": {**words, "weight": 3, "eval": "train[:1]"},
        }
    )
    questions = [row["prompt"][0]["content"] for row in splits.train]
    drawn = {name: report["rows_drawn"] for name, report in splits.report["sources"].items()}
    assert drawn == {"sums": sum("+" in q for q in questions), "words": sum("word" in q for q in questions)}
    assert drawn["words"] == 30  # the heavier one runs out first
    assert drawn["sums"] < 20
    assert [row["prompt"][0]["content"] for row in splits.eval] == ["0 + 1", "1 + 1", "word 1"]
    assert [row["prompt"][0]["content"] for row in splits.held_out] == ["0 + 1", "1 + 1", "word 1"]
    assert splits.report["train"]["rows"] == len(splits.train) == sum(drawn.values())
    assert splits.report["sources"]["sums"]["train"]["rows_read"] == 30


def test_rewards_get_the_columns_that_every_source_has(sums, words, caplog):
    with caplog.at_level(logging.WARNING):
        splits = load("prompt", sources={"sums": sums, "words": words})
    assert splits.train.column_names == ["prompt", "reference"]
    assert "columns answer are left out" in caplog.text


def test_the_fingerprint_of_a_mixture_follows_its_sources(sums, words):
    def of(**sources):
        return load(sources=sources).report["train"]["fingerprint"]

    assert of(a=sums, b=words) == of(a=sums, b=words) != of(a=sums, b={**words, "train": "train[:29]"})


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "Text and messages cannot be in one run: prompt is messages in sums, text in o",
        ),
        ({"text": "a"}, "the trainer would read ['completion', 'prompt'] in sums; ['text'] in o"),
    ],
)
def test_sources_of_different_types_are_refused(sums, tmp_path, other, told):
    path = write(tmp_path / "other.jsonl", [other])
    assert told in refusal(sources={"sums": sums, "o": {"path": path}})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sources": {}}, "dataset.sources is empty"),
        ({"sources": {"a": {"path": "x"}}, "path": "y"}, "dataset.path has no effect beside dataset.sources"),
        ({"sources": {"a": {"path": "x", "weight": 0}}}, "dataset.sources.a.weight=0 draws no row"),
        ({"sources": {"a": {"path": "x", "too_long": "fail"}}}, "dataset.sources.a.too_long has no effect"),
        ({"sources": {"a": {"sources": {"b": {}}}}}, "dataset.sources.a has sources itself"),
        ({"sources": {"a": {}}}, "dataset.sources.a has no path"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(options, told):
    assert told in refusal(**options)
