import json
import logging

import pytest

from runner.data import fingerprint, load_source
from runner.errors import ConfigError

ROWS = [{"prompt": f"question {n}", "completion": f" answer {n}"} for n in range(10)]


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return str(path)


def load(path, reads="sft", **options):
    return load_source(reads, "dataset", path=path, **options)


def refusal(path, reads="sft", **options):
    with pytest.raises(ConfigError) as caught:
        load(path, reads, **options)
    return str(caught.value)


def test_rows_are_read_converted_and_reported(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    train, evaluation = load(path, train="train[:8]", eval="train[8:]")
    assert train.rows == ROWS[:8]
    assert evaluation.rows == ROWS[8:]
    assert train.report == {
        "split": "train[:8]",
        "format": "prompt_completion",
        "rows_read": 8,
        "rows_kept": 8,
        "rows": 8,
        "dropped": {},
        "skipped": {},
        "fingerprint": fingerprint(ROWS[:8]),
        "files": [{"path": path, "bytes": (tmp_path / "rows.jsonl").stat().st_size}],
    }


def test_the_fingerprint_does_not_depend_on_the_file_format(tmp_path):
    from datasets import Dataset

    chat = [{"role": "user", "content": "Où ?"}, {"role": "assistant", "content": "两地"}]
    called = [
        chat[0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    rows = [{"messages": chat}, {"messages": [*called, {"role": "tool", "content": "1"}, chat[1]]}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")  # fills absent keys with null
    assert (
        len({load(str(tmp_path / name))[0].report["fingerprint"] for name in ("a.jsonl", "b.json", "c.parquet")}) == 1
    )


def test_the_fingerprint_is_the_hash_of_sorted_json_lines():
    # printf '{"a": "é", "b": 1}\n' | sha256sum
    expected = "11c6395ebb9a08d017f5ec54f1d9571478149b34de501a85a09b6ce3204f4797"
    assert fingerprint([{"b": 1, "a": "é", "c": None}]) == expected
    assert fingerprint(ROWS) != fingerprint(ROWS[::-1])


def test_bad_rows_are_refused_naming_file_line_field_and_reason(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:2], {"prompt": "a", "completion": ""}, "broken", *ROWS[2:]])
    message = refusal(path)
    assert message.startswith(f"{path} train has 2 bad rows in the first 12 of 12:\n")
    assert f"\n  {path}:3: completion is empty" in message
    assert f"\n  {path}:4: line is not JSON: Expecting value at character 1" in message
    assert "dataset.bad_rows=drop" in message


def test_after_some_bad_rows_the_rest_is_not_read(tmp_path):
    # faults are rows 2 to 6; row 7 is not looked at
    path = write(tmp_path / "rows.jsonl", [ROWS[0], *[{"prompt": "a", "completion": None}] * 8])
    message = refusal(path)
    assert "has 5 bad rows in the first 6 of 9" in message
    assert f"{path}:6" in message
    assert f"{path}:7" not in message


def test_dropped_rows_are_counted_by_reason(tmp_path, caplog):
    bad = [{"prompt": "a", "completion": ""}, {"prompt": "", "completion": "b"}, {"prompt": "a", "completion": ""}, "{"]
    with caplog.at_level(logging.WARNING):
        train, _ = load(write(tmp_path / "rows.jsonl", [*ROWS, *bad]), bad_rows="drop")
    assert train.rows == ROWS
    assert train.report["rows_read"] == 14
    assert train.report["rows_kept"] == 10
    assert train.report["dropped"] == {
        "completion is empty": 2,
        "prompt is empty": 1,
        "line is not JSON: Expecting property name enclosed in double quotes at character N": 1,
    }
    assert "dropped 4 of 14 rows: completion is empty (2)" in caplog.text


def test_rows_that_are_all_bad_are_refused_also_with_drop(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    assert "No row was good" in refusal(path, bad_rows="drop")
    assert "has 2 bad rows" in refusal(write(tmp_path / "broken.jsonl", ["{", "["]), bad_rows="drop")


def test_text_beside_messages_is_a_bad_row(tmp_path):
    chat = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    path = write(tmp_path / "rows.jsonl", [ROWS[0], chat])
    assert f"{path}:2: prompt is messages, but text in {path}:1" in refusal(path)
    assert load(path, bad_rows="drop")[0].rows == ROWS[:1]


def test_labels_in_csv_are_parsed(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\na,b,true\na,c,False\na,d,0\n")
    train, _ = load(str(tmp_path / "rows.csv"), reads="unpaired")
    assert [row["label"] for row in train.rows] == [True, False, False]


def test_columns_are_renamed_before_the_format_is_recognised(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": row["prompt"], "reply": row["completion"]} for row in ROWS])
    assert load(path, rename={"question": "prompt", "reply": "completion"})[0].rows == ROWS


def test_renaming_does_not_hide_that_no_line_can_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{not json}\n" * 2)
    assert "rows.jsonl:1: " in refusal(str(tmp_path / "rows.jsonl"), rename={"question": "prompt"})


def test_renaming_can_swap(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    train, _ = load(path, reads="preference", rename={"chosen": "rejected", "rejected": "chosen"})
    assert train.rows == [{"prompt": "p", "chosen": "b", "rejected": "a"}]


def test_renaming_what_is_not_there_or_onto_what_is_there_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert "there is no column question, only completion, prompt" in refusal(path, rename={"question": "prompt"})
    assert "there is a column prompt already" in refusal(path, rename={"completion": "prompt"})


def test_a_trainer_that_cannot_read_the_format_is_refused_before_anything_is_read(tmp_path):
    message = refusal(str(tmp_path / "there-is-no-such-file.jsonl"), reads="preference", format="gsm8k")
    assert "rows lack ['chosen', 'rejected']" in message


def test_a_trainer_that_cannot_read_the_rows_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert f"trainer=kto cannot read dataset={path}: rows lack ['label']" in refusal(path, reads="unpaired")


def test_an_unknown_format_names_the_known_ones(tmp_path):
    message = refusal(write(tmp_path / "rows.jsonl", ROWS), format="aplaca")
    assert message.startswith("There is no dataset.format=aplaca. Choose auto or one of")
    assert "alpaca" in message


def test_a_format_that_cannot_be_told_names_the_columns_and_the_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"x": "1", "y": "2"}])
    message = refusal(path)
    assert message.startswith(f"{path} train: ")
    assert "['x', 'y']" in message


def test_no_good_completion_to_learn_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "label": False}])
    assert "has no row to train on: label is false (1)" in refusal(path)


def test_columns_that_no_reward_gets_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "rows.jsonl", [{"prompt": "a", "image": "x.png"}]), reads="prompt")
    assert "no reward gets image" in caplog.text


def test_eval_rows_that_are_trained_on_are_named(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with caplog.at_level(logging.WARNING):
        load(path, train="train[:6]", eval="train[4:]")
        assert "2 rows of dataset.eval=train[4:] are trained on too" in caplog.text
        caplog.clear()
        load(path, train="train[:6]", eval="train[6:]")
        assert not caplog.text


def test_a_generator_makes_the_splits():
    options = {"generator": "arithmetic", "train_rows": 6, "eval_rows": 3, "max_value": 9, "seed": 1}
    train, evaluation = load_source("prompt", "dataset", train="train[:4]", eval="validation", **options)
    assert [len(train.rows), len(evaluation.rows)] == [4, 3]
    assert {"prompt", "answer"} <= train.rows[0].keys()
    assert train.report["format"] == "arithmetic"


def test_unknown_keys_are_refused():
    with pytest.raises(TypeError, match="pth"):
        load("rows.jsonl", pth="x")
    with pytest.raises(TypeError, match="train_row"):
        load_source("sft", "dataset", generator="arithmetic", train_row=3)


def test_what_has_no_path_is_refused():
    assert "dataset has no path" in refusal(None)
    assert "There is no dataset.generator=arithmetics" in refusal(None, generator="arithmetics")
    assert "a path and a generator" in refusal("rows.jsonl", generator="arithmetic")
