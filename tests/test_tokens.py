import logging

import pytest
from tiny import TEMPLATE, tiny_tokenizer

from runner.data import load_splits
from runner.encoding import Counts, encode_rows
from runner.errors import ConfigError
from runner.tables import make_features, make_table
from runner.tokens import fit_lengths, fit_splits

# The tiny tokenizer has one token for each of the letters z and q, and for each special token.
# A chat is <|bos|>, then for each message its role, its letters and <|eos|>; an answer begins after <|assistant|>.


def chat(question, answer):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def preference(question, chosen, rejected):
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": chat(question, "")["prompt"], **{k: chat("", v)["completion"] for k, v in sides.items()}}


def table(rows):
    return make_table(rows, make_features(rows))


def fit(rows, tokenizer=None, *, reads="sft", max_length=None, too_long="drop", **options):
    tokenizer = tokenizer or tiny_tokenizer()
    limits = {"max_length": max_length, "too_long": too_long}
    fitted, ids, audit = fit_lengths(table(rows), tokenizer, reads=reads, name="train", **limits, **options)
    assert len(ids) == len(fitted)
    return fitted, audit


def count_tokens(rows, tokenizer, *, reads):
    return [[Counts(**one) for one in row["counts"]] for row in encode_rows(rows, tokenizer, reads=reads)]


def refusal(*arguments, **options):
    with pytest.raises(ConfigError) as caught:
        fit(*arguments, **options)
    return str(caught.value)


def lengths(row, tokenizer, reads="sft"):
    return [(counts.prompt, counts.total) for counts in count_tokens([row], tokenizer, reads=reads)[0]]


def test_the_tokens_of_a_chat_are_counted_as_rendered():
    # bos user z z eos assistant | q q q eos
    (counts,) = count_tokens([chat("zz", "qqq")], tiny_tokenizer(), reads="sft")[0]
    assert counts == Counts(prompt=6, total=10, stops=True, bos=1, differs=False)


def test_text_gets_a_stop_token_and_what_the_tokenizer_adds():
    # z z | q q q eos, and bos before it
    row = {"prompt": "zz", "completion": "qqq"}
    assert lengths(row, tiny_tokenizer()) == [(2, 6)]
    assert lengths(row, tiny_tokenizer(adds_bos=True)) == [(3, 7)]
    assert lengths({**row, "completion": "qqq<|eos|>"}, tiny_tokenizer()) == [(2, 6)]
    assert lengths({"text": "zzqqq"}, tiny_tokenizer()) == [(0, 6)]


def test_both_sides_of_a_preference_are_counted():
    # bos user z eos assistant | q eos, and | q q q eos
    assert lengths(preference("z", "q", "qqq"), tiny_tokenizer(), "preference") == [(5, 7), (5, 9)]
    assert lengths({"chosen": "zq", "rejected": "zqq"}, tiny_tokenizer(), "preference") == [(0, 3), (0, 4)]


def test_of_an_online_trainer_only_the_prompt_counts():
    # bos user z z eos assistant; text gets no stop token
    assert lengths({**chat("zz", "q"), "answer": "q"}, tiny_tokenizer(), "prompt") == [(6, 6)]
    assert lengths({"prompt": "zz", "answer": "q"}, tiny_tokenizer(), "prompt") == [(2, 2)]


def test_tools_are_told_to_the_template_but_not_by_trls_online_trainers():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + TEMPLATE
    row = {**chat("zz", "q"), "tools": '[{"name": "zzzz"}]'}
    assert lengths(row, tokenizer) == [(10, 12)]
    totals = {
        trainer: fit([row], tokenizer, reads="prompt", trainer=trainer)[1]["prompt_tokens"]["max"]
        for trainer in ("grpo", "ppo")
    }
    assert totals == {"grpo": 6, "ppo": 10}


def test_rows_over_max_length_are_left_out_and_counted(caplog):
    # 4 + 2 + 2: bos user eos assistant, q eos, and the letters of the question: 7, 8, 9, 10
    rows = [chat("z" * n, "q") for n in (1, 2, 3, 4)]
    with caplog.at_level(logging.WARNING):
        kept, audit = fit(rows, max_length=8)
    assert kept.to_list() == rows[:2]
    assert {name: audit[name] for name in ("rows", "over_length", "dropped", "truncated")} == {
        "rows": 4,
        "over_length": 2,
        "dropped": 2,
        "truncated": 0.0,
    }
    assert "2 of 4 rows are left out: over trainer.max_length=8 tokens" in caplog.text


def test_a_preference_is_too_long_when_one_side_is():
    assert len(fit([preference("z", "q", "qqq")], reads="preference", max_length=9)[0]) == 1
    assert "the shortest has 9" in refusal([preference("z", "q", "qqq")], reads="preference", max_length=8)


def test_rows_over_max_length_are_refused_by_number_and_length():
    message = refusal([chat("z", "q"), chat("zz", "q"), chat("zzz", "q")], max_length=7, too_long="fail")
    assert "2 of 3 train rows are over trainer.max_length=7 tokens: row 2 has 8, row 3 has 9" in message


def test_truncation_keeps_rows_but_those_of_which_nothing_is_learnt():
    # prompts of 5, 5 and 8 tokens, rows of 7, 11 and 10: the first fits, the second is cut, the third has no answer
    rows = [chat("z", "q"), chat("z", "qqqqq"), chat("zzzz", "q")]
    kept, audit = fit(rows, max_length=8, too_long="truncate")
    assert kept.to_list() == rows[:2]
    assert audit["over_length"] == 2
    assert audit["dropped"] == 1
    assert audit["no_supervised_token"] == pytest.approx(1 / 3)
    assert audit["truncated"] == 0.5
    assert audit["stop_token_in_loss"] == 0.5
    assert audit["tokens"] == 7 + 8


@pytest.mark.parametrize(("reads", "trainer"), [("prompt", "grpo"), ("preference", "reward")])
def test_what_a_trainer_never_cuts_cannot_be_truncated(reads, trainer):
    row = preference("z", "q", "qq")
    assert f"{trainer} trainer never cuts" in refusal([row], reads=reads, trainer=trainer, too_long="truncate")


@pytest.mark.parametrize(
    ("trainer", "reads", "found"),
    [("sft", "sft", "trainer.max_length is not set"), ("grpo", "prompt", "no limit for prompts"),
     ("ppo", "prompt", "trainer.max_prompt_length is not set")],
)  # fmt: skip
def test_a_refusal_that_could_never_come_is_refused(trainer, reads, found):
    assert found in refusal([chat("z", "q")], reads=reads, trainer=trainer, too_long="fail")


def test_ppo_cuts_long_prompts_itself():
    kept, audit = fit([chat("z" * 9, "q")], reads="prompt", trainer="ppo", max_length=4, too_long="truncate")
    assert (len(kept), audit["over_length"]) == (1, 1)


def test_without_a_limit_every_row_stays():
    kept, audit = fit([chat("z" * 300, "q")])
    assert len(kept) == 1
    assert audit["over_length"] == 0


def test_quantiles_are_lengths_of_rows():
    # prompts of 4 + n letters, n = 1 ... 100; every answer is q eos
    _, audit = fit([chat("z" * n, "q") for n in range(1, 101)])
    assert audit["prompt_tokens"] == {"p50": 54, "p90": 94, "p99": 103, "max": 104}
    assert audit["completion_tokens"] == {"p50": 2, "p90": 2, "p99": 2, "max": 2}
    assert audit["tokens"] == sum(4 + n + 2 for n in range(1, 101))


def test_the_longest_pair_counts_its_prompt_once():
    # prompts of 5 and 7 tokens; answers of 2 and 4, and of 2 and 3
    _, audit = fit([preference("z", "q", "qqq"), preference("zzz", "q", "qq")], reads="preference")
    assert audit["longest_pair"] == 7 + 2 + 3
    # at most 9 tokens: the first is 7 and 9, less 5; the second is 9 and 9, less 7
    _, audit = fit([preference("z", "q", "qqq"), preference("zzz", "q", "qq")], reads="preference", max_length=9,
                   too_long="truncate")  # fmt: skip
    assert audit["longest_pair"] == 11


def test_what_the_longest_rows_begin_with_is_counted():
    # <|bos|>, the role and 2 letters; of one row all: 4 tokens about 3 letters, and an answer of 2
    _, audit = fit([chat("zzq", "q"), chat("zzz", "qq"), chat("zzqq", "q")])
    assert audit["common"] == 2 + 2
    _, audit = fit([chat("zzq", "q")])
    assert audit["common"] == 4 + 3 + 2
    _, audit = fit([chat("zzq", "q" * 9)] * 2, max_length=10, too_long="truncate")
    assert audit["common"] == audit["longest"] == 10
    _, audit = fit([chat("z" * 9, "q")] * 16 + [chat("q", "q")])  # one that is none of the longest
    assert audit["common"] == 2


def test_an_answer_without_a_stop_token_is_found(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("+ eos_token", "")
    with caplog.at_level(logging.WARNING):
        _, audit = fit([chat("z", "q")], tokenizer)
    assert audit["stop_token_in_loss"] == 0.0
    assert "100.0% of sequences do not end with a stop token" in caplog.text


def test_whitespace_after_the_stop_token_does_not_hide_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("+ eos_token", "+ eos_token + '\\n'")
    assert fit([chat("z", "q")], tokenizer)[1]["stop_token_in_loss"] == 1.0


def test_the_token_that_ends_a_turn_stops_too():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("+ eos_token", "+ '<|tool|>'")
    assert fit([chat("z", "q")], tokenizer)[1]["stop_token_in_loss"] == 1.0


def test_a_doubled_beginning_is_found(caplog):
    with caplog.at_level(logging.WARNING):
        _, audit = fit([{"text": "<|bos|>zz"}, {"text": "zz"}], tiny_tokenizer(adds_bos=True))
    assert audit["bos"] == 1.0
    assert audit["double_bos"] == 0.5
    assert "50.0% of sequences start with two beginning-of-sequence tokens" in caplog.text


def test_a_prompt_that_is_rendered_otherwise_alone_is_found():
    # alone: ... assistant tool; before an answer: ... assistant | q eos
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><|tool|>' }}")
    assert fit([chat("zz", "q")], tokenizer)[1]["prompt_differs"] == 1.0
    assert lengths(chat("zz", "q"), tokenizer) == [(6, 8)]


def test_a_pad_token_that_is_the_stop_token_is_found():
    tokenizer = tiny_tokenizer()
    assert fit([chat("z", "q")], tokenizer)[1]["pad_is_eos"] is False
    tokenizer.pad_token = tokenizer.eos_token
    assert fit([chat("z", "q")], tokenizer)[1]["pad_is_eos"] is True


def test_a_row_that_the_template_refuses_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'zz' %}{{ raise_exception('no zz') }}{% endif %}" + TEMPLATE
    )
    assert "The chat template refuses row 2: no zz" in refusal([chat("z", "q"), chat("zz", "q")], tokenizer)


def test_messages_without_a_chat_template_are_refused():
    assert "need a chat template" in refusal([chat("z", "q")], tiny_tokenizer(chat=False))


def test_both_splits_of_a_run_are_fitted(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "{"z" * n}", "completion": "q"}}\n' for n in (1, 9, 1, 9))
    )
    splits = load_splits(
        reads="sft", run_seed=0, path=str(tmp_path / "rows.jsonl"), train="train[:2]", eval="train[2:]"
    )
    fitted, audit = fit_splits(splits, tiny_tokenizer(), reads="sft", max_length=5, too_long="drop")
    assert [len(fitted.train), len(fitted.eval)] == [1, 1]
    assert [audit["train"]["dropped"], audit["eval"]["dropped"]] == [1, 1]


def test_a_tokenizer_without_offsets_is_counted_too():
    # bytes and </s>: alone the prompt is a b </s>, the whole is a b | c d </s>
    from transformers import ByT5Tokenizer

    assert lengths({"prompt": "ab", "completion": "cd"}, ByT5Tokenizer()) == [(2, 5)]
