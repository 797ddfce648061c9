import logging
from types import SimpleNamespace

import pytest
import trl
from datasets import config
from tiny import TEMPLATE, tiny_tokenizer

from runner import encoding, trainer_source
from runner.data import Splits
from runner.encoding import encode
from runner.prepared import choose_rows, prepared
from runner.tables import make_features, make_table
from runner.tokens import fit_splits
from runner.views import row_kind, view


def preference(question, chosen, rejected, **more):
    turns = {"prompt": ("user", question), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {key: [{"role": role, "content": text}] for key, (role, text) in turns.items()} | more


ROWS = {
    "chat": [
        preference("What is it?", "The end.", "Nothing at all"),
        preference("两地", " 八 ", "x\n\n"),
        preference("and", "the other", "at"),
    ],
    "text": [
        {"prompt": "What is it? ", "chosen": "The end.", "rejected": " Nothing"},
        {"prompt": "It is th", "chosen": "e other one", "rejected": "at one"},
        {"prompt": "x\n", "chosen": "\nshe", "rejected": " on"},
    ],
}


def table(kind, rows):
    rows = view(row_kind(kind.lower()), rows)[0]
    return make_table(rows, make_features(rows))


def arguments_of(kind, tmp_path, **options):
    return getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def trainer_of(cls, tokenizer):
    trainer = cls.__new__(cls)  # only what its preparation of rows reads
    trainer.__dict__.update(_tokenizer=tokenizer, completion_only_loss=True, chat_template=None, calculate_KL=True)
    trainer.__dict__.update(desirable_weight=1.0, undesirable_weight=1.0)
    return trainer


def both(kind, rows, tokenizer, arguments, too_long="truncate"):
    """Return the rows that the trainer gets from TRL's preparation, and from ours."""
    dataset, name = table(kind, rows), kind.lower()
    cls = getattr(trl, f"{kind}Trainer")
    more = (False, None) if kind == "SFT" else ()
    theirs = cls._prepare_dataset(trainer_of(cls, tokenizer), dataset, tokenizer, arguments, *more, "train")
    splits = Splits(dataset, None, [], {})
    splits, _ = fit_splits(
        splits, tokenizer, reads=row_kind(name), max_length=arguments.max_length, too_long=too_long, trainer=name
    )
    chosen, _ = choose_rows(splits, arguments, trainer=name)
    assert chosen is not splits.train
    own = prepared(cls)
    ours = own._prepare_dataset(trainer_of(own, tokenizer), chosen, tokenizer, arguments, *more, "train")
    columns = ours.column_names
    return theirs.select_columns(columns).to_list(), ours.to_list()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "Reward"])
def test_the_token_ids_are_those_of_trl(rows, adds_bos, kind, tmp_path):
    arguments = arguments_of(kind, tmp_path, per_device_train_batch_size=2)
    policy = "drop" if kind == "Reward" else "truncate"
    theirs, ours = both(kind, rows, tiny_tokenizer(adds_bos=adds_bos), arguments, policy)
    assert ours == theirs
    assert {"SFT": "labels", "DPO": "rejected_ids", "KTO": "KL_completion_ids", "Reward": "chosen_ids"}[kind] in ours[0]


def test_processes_that_would_prepare_nothing_are_told(tmp_path, caplog):
    both("SFT", ROWS["text"], tiny_tokenizer(), arguments_of("SFT", tmp_path, dataset_num_proc=2))
    assert "trainer.dataset_num_proc has no effect" in caplog.text


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_trl_would_cut_is_cut(mode, tmp_path):
    arguments = arguments_of("SFT", tmp_path, max_length=7, truncation_mode=mode)
    rows = [{"prompt": "zz", "completion": "q" * 9}, {"prompt": "z", "completion": "q"}]
    theirs, ours = both("SFT", rows, tiny_tokenizer(), arguments)
    assert ours == theirs
    assert [len(row["input_ids"]) for row in ours] == [7, 3]


def test_a_prompt_that_the_template_writes_otherwise_alone_ends_where_trl_ends_it(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><|tool|>' }}")
    theirs, ours = both("DPO", ROWS["chat"], tokenizer, arguments_of("DPO", tmp_path))
    assert ours == theirs


@pytest.mark.parametrize("greedy", [False, True], ids=["plain", "one takes the space before it"])
def test_a_chat_in_pieces_is_encoded_as_it_is_whole(greedy):
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|mask|>", special=True, normalized=False, lstrip=greedy), "<|us", "then"])
    last = ["the <|mask|>", "an <|us<|user|>er|> then<|eos|>", "<|<|eos|>", "两 \n<|tool|>\n then"]
    rows = [preference(f"the {n}", "on the end", "at it") for n in range(encoding.COMPARED)]
    rows += [preference(text, text + "in", "to" + text) for text in last]
    for one in (one for row in encoding.spell_rows(rows, tokenizer, reads="preference") for one in row):
        assert one.ids == tokenizer(one.text, add_special_tokens=False)["input_ids"], one.text


def test_a_tokenizer_that_marks_the_start_of_a_text_encodes_it_whole():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The first word of a text is "▁a", and what follows a special token is "a" unless a space is between them.
    backend = Tokenizer(models.WordLevel({"?": 0, "▁a": 1, "a": 2, "<|eos|>": 3, "▁": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
    tokenizer.chat_template = "{% for message in messages %}{{ ' ' + message['content'] + '<|eos|>' }}{% endfor %}"
    rows = [preference("a", "a", "a")] * (4 * encoding.COMPARED)
    rows[2 * encoding.COMPARED] = preference("a<|eos|>a", "a", "a")
    spelt = encoding.spell_rows(rows, tokenizer, reads="preference")
    assert spelt[0][0].ids == [1, 3, 1, 3]
    assert spelt[2 * encoding.COMPARED][0].ids == [1, 3, 2, 3, 1, 3]


def test_rows_are_encoded_once(monkeypatch, caplog):
    rows, tokenizer = table("DPO", [preference("once", "a", "b")]), tiny_tokenizer()
    first = encode(rows, tokenizer, reads="preference", trainer="dpo")
    monkeypatch.setattr(encoding, "encode_rows", lambda *_, **__: pytest.fail("it encodes again"))
    caplog.set_level(logging.INFO)
    again = encode(table("DPO", [preference("once", "a", "b")]), tokenizer, reads="preference", trainer="dpo")
    assert again.to_list() == first.to_list()
    assert "train: 1 rows were tokenized before" in caplog.text


def test_other_rows_templates_tokenizers_and_trainers_have_other_ids():
    rows, tokenizer = table("DPO", [preference("which", "a", "b")]), tiny_tokenizer()
    changed = tiny_tokenizer()
    changed.chat_template = TEMPLATE.replace("bos_token", "eos_token")
    made = [
        encode(rows, tokenizer, reads="preference", trainer="dpo"),
        encode(rows, tokenizer, reads="preference", trainer="reward"),
        encode(rows, changed, reads="preference", trainer="dpo"),
        encode(rows, tiny_tokenizer(pad=False), reads="preference", trainer="dpo"),
        encode(table("DPO", [preference("which", "a", "c")]), tokenizer, reads="preference", trainer="dpo"),
        encode(table("DPO", [preference("which", "a", "b")]), tokenizer, reads="preference", trainer="dpo"),
    ]
    files = [one.cache_files[0]["filename"] for one in made]
    assert len(set(files)) == 5
    assert files[0] == files[5]


def test_a_damaged_file_is_made_again(caplog):
    from pathlib import Path

    rows, tokenizer = table("SFT", [{"text": "damaged"}]), tiny_tokenizer()
    made = encode(rows, tokenizer, reads="sft", trainer="sft")
    Path(made.cache_files[0]["filename"]).write_bytes(b"\0" * 64)
    again = encode(rows, tokenizer, reads="sft", trainer="sft")
    assert "is damaged, and made again" in caplog.text
    assert again["input_ids"][0] == tokenizer("damaged<|eos|>")["input_ids"]


def test_without_a_place_for_them_ids_are_in_memory(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "file")
    made = encode(table("SFT", [{"text": "nowhere"}]), tiny_tokenizer(), reads="sft", trainer="sft")
    assert (len(made), made.cache_files) == (1, [])
    assert "Token ids are not kept" in caplog.text


@pytest.mark.parametrize("reason", ["trainer.assistant_only_loss", "version"])
def test_where_trl_would_encode_otherwise_it_prepares_the_rows(reason, monkeypatch, caplog):
    if reason == "version":
        monkeypatch.setattr(trainer_source, "VERSIONS", ("1.15",))
    caplog.set_level(logging.INFO)
    rows = table("SFT", [{"text": "theirs"}])
    splits, _ = fit_splits(
        Splits(rows, None, [], {}), tiny_tokenizer(), reads="sft", max_length=None, too_long="drop", trainer="sft"
    )
    arguments = SimpleNamespace(assistant_only_loss=reason != "version")
    assert choose_rows(splits, arguments, trainer="sft") == (splits.train, None)
    assert f"TRL prepares the rows itself: {reason if reason != 'version' else 'its version'}" in caplog.text


def test_weights_that_do_not_make_up_for_few_good_rows_are_told(tmp_path, caplog):
    # 1 good and 3 bad: a third, where 1 to 1.33 is right
    rows = [{"prompt": "z", "completion": "q" * n, "label": n == 1} for n in (1, 2, 3, 4)]
    both("KTO", rows, tiny_tokenizer(), arguments_of("KTO", tmp_path))
    assert "trainer.desirable_weight x good is 0.33 of" in caplog.text
    caplog.clear()
    both("KTO", rows, tiny_tokenizer(), arguments_of("KTO", tmp_path, desirable_weight=3.5))
    assert "desirable_weight x good" not in caplog.text
