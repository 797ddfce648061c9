import math
import re
import sys
from types import SimpleNamespace

import pytest

from runner.errors import ConfigError, RunStopped
from runner.rewards import (
    Rewards,
    Scorer,
    build_rewards,
    exact_match,
    format,
    length,
    needed_columns,
    unique_chars,
)


def no_model(node):
    raise AssertionError("no model was named")


def build(node, columns=("prompt", "answer"), load_model=no_model, allowed=()) -> Rewards:
    return build_rewards(node, columns=set(columns), load_model=load_model, allowed=allowed)


# --- the functions


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("12", "12"),
        (" 12.", "12"),
        ("5 + 7 = 12", "12"),
        ("The answer is 12. I am 100% sure.", "12"),  # what is said of the answer does not count
        ("The answer is 5 + 7 = 12.", "12"),
        ("Answer:\n**12**", 12),
        ("So $\\boxed{12}$, or 1 dozen.", "12"),
        ("2 * 600\n#### 1,200", "1200"),
        ("1200.0", "1,200"),
        ("It costs $1,200.", "1200"),
        ("minus: -3", "-3"),
        ("minus: −3", -3),  # noqa: RUF001 - the minus sign that models write
        ("7-4", "4"),  # a difference, not a negative number
        ("3.5", 3.5),
        ("paris.", "Paris"),
        ("Let me think.\n Paris", "Paris"),
        ("The answer is: new  york!", "New York"),
        ("The answer is Mr. Smith.", "Mr. Smith"),
        ("Tuesday, December 13, 1994.", "Tuesday, December 13, 1994."),
        ("B", ["A", "B"]),
        ("7", ["8", "7"]),
    ],
)
def test_right_answers_match(completion, answer):
    assert exact_match([completion], [answer]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "12"),
        ("I do not know.", "12"),
        ("112", "12"),
        ("12 = 5 + 7", "12"),  # only the last number counts
        ("10, 11, 12, 13", "12"),
        ("The answer is 12. No, the answer is 13.", "12"),  # only the last claim counts
        ("The answer is probably big. 12", "12"),
        ("3", "-3"),
        ("-3", "3"),
        ("12.5", "12"),
        ("twelve", "12"),
        ("A, B, C or D", "B"),  # a text answer must be all of it
        ("Yes and no", "yes"),
        ("Paris, of course", "Paris"),
        ("B", ["A", "C"]),
        ("B", []),
    ],
)
def test_wrong_and_lucky_answers_do_not_match(completion, answer):
    assert exact_match([completion], [answer]) == [0.0]


def test_a_row_without_answer_has_no_reward():
    assert exact_match(["12", "13"], [None, "13"]) == [None, 1.0]


def test_messages_count_by_their_content():
    chat = [{"role": "assistant", "content": None}, {"role": "assistant", "content": "aab"}]
    # "\n", "a" and "b"
    assert unique_chars([chat]) == [3.0]
    assert exact_match([[{"role": "assistant", "content": "It is 4."}]], ["4"]) == [1.0]


def test_unique_characters_are_counted():
    assert unique_chars(["", "aaa", "abcA"]) == [0.0, 1.0, 4.0]


def test_length_counts_or_measures_the_distance_to_a_target():
    texts = ["", "two words", "and three words"]  # 0, 9 and 15 characters
    assert length(texts) == [0.0, 9.0, 15.0]
    assert length(texts, unit="words") == [0.0, 2.0, 3.0]
    assert length(texts, target=10) == [-10.0, -1.0, -5.0]
    assert length(texts, unit="words", target=0) == [0.0, -2.0, -3.0]


def test_format_matches_the_whole_or_a_part():
    texts = ["<a>\n</a>", "x <a></a>", ""]
    assert format(texts, pattern="<a>.*</a>") == [1.0, 0.0, 0.0]
    assert format(texts, pattern="<a>.*</a>", whole=False) == [1.0, 1.0, 0.0]


# --- a scorer


def test_a_scorer_has_a_name_and_passes_options_and_columns():
    def near(completions, target, *, scale, **kwargs):
        assert set(kwargs) == {"prompts", "trainer_state"}
        return [scale * abs(len(c) - t) for c, t in zip(completions, target, strict=True)]

    scorer = Scorer(near, name="near", options={"scale": 10})
    assert scorer.__name__ == "near"
    # |1 - 3| * 10 and |3 - 2| * 10
    assert scorer(["a", "abc"], prompts=["p", "q"], target=[3, 2], trainer_state=object()) == [20.0, 10.0]


def test_a_function_without_kwargs_gets_only_what_it_names():
    def plain(completions):
        return [1 for _ in completions]

    assert Scorer(plain, name="plain", options={})(["a"], prompts=["p"], answer=["4"]) == [1.0]


def test_a_function_that_raises_stops_the_run_with_the_completion_that_did_it():
    def inverse(completions, **kwargs):
        return [1 / len(c) for c in completions]

    with pytest.raises(RunStopped) as caught:
        Scorer(inverse, name="inverse", options={})(["a", "", "b"], prompts=["p0", "p1", "p2"])
    message = str(caught.value)
    assert "reward inverse" in message
    assert "ZeroDivisionError: division by zero" in message
    assert "prompt: 'p1'" in message
    assert "completion: ''" in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_columns_are_cut_with_the_completions_in_the_search_for_the_culprit():
    def strict(completions, answer, **kwargs):
        return [float(int(a)) for _, a in zip(completions, answer, strict=True)]

    with pytest.raises(RunStopped, match="completion: 'second'"):
        Scorer(strict, name="strict", options={})(["first", "second"], answer=["1", "one"])


def test_a_function_that_fails_on_the_batch_alone_still_stops_the_run():
    def lonely(completions, **kwargs):
        if len(completions) > 1:
            raise ValueError("one at a time")
        return [0.0]

    with pytest.raises(RunStopped, match=r"ValueError: one at a time, though for no completion of the batch alone"):
        Scorer(lonely, name="lonely", options={})(["a", "b"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1.0", [1.0], "high", object()])
def test_rewards_that_are_no_finite_number_stop_the_run_with_their_completion(bad):
    scorer = Scorer(lambda completions, **kwargs: [0.5, bad], name="odd", options={})
    with pytest.raises(RunStopped, match=r"(?s)reward odd failed: it gave .*completion: 'second'"):
        scorer(["first", "second"], prompts=["p", "q"])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_wrong_number_of_rewards_stops_the_run(values):
    scorer = Scorer(lambda completions, **kwargs: values, name="short", options={})
    with pytest.raises(RunStopped, match=f"it gave {len(values)} values for 2 completions"):
        scorer(["a", "b"])


def test_a_single_number_for_the_batch_stops_the_run():
    with pytest.raises(RunStopped, match="TypeError"):
        Scorer(lambda completions, **kwargs: 1.0, name="single", options={})(["a"])


def test_none_bools_and_number_types_of_libraries_are_rewards():
    class Scalar:  # like numpy.float32 or a tensor
        def __float__(self):
            return 0.25

    scorer = Scorer(lambda completions, **kwargs: (None, True, Scalar()), name="mixed", options={})
    assert scorer(["a", "b", "c"]) == [None, 1.0, 0.25]


# --- building


def test_needed_columns_are_the_parameters_that_only_the_dataset_can_give():
    def own(prompts, completions, entry, hint="", *, scale=1.0, log_metric=None, **kwargs):
        return []

    assert needed_columns(own) == ["entry"]
    assert needed_columns(exact_match) == ["answer"]
    assert needed_columns(format) == []


def test_a_single_reward_is_named_after_its_function():
    rewards = build({"function": "exact_match", "weight": 2.0})
    assert [f.__name__ for f in rewards.functions] == ["exact_match"]
    assert (rewards.weights, rewards.tokenizers) == ([2.0], [None])
    assert rewards.functions[0](["4"], answer=["4"]) == [1.0]


def test_the_weights_of_nested_sums_are_multiplied_and_terms_give_the_names():
    inner = {"terms": {"long": {"function": "length", "unit": "words", "weight": 3.0}}, "weight": 0.5}
    node = {"terms": {"right": {"function": "exact_match", "weight": 10.0}, "style": inner}, "weight": 2.0}
    rewards = build(node)
    assert [f.__name__ for f in rewards.functions] == ["right", "style.long"]
    # 2 * 10 and 2 * 0.5 * 3
    assert rewards.weights == [20.0, 3.0]
    assert rewards.functions[1](["a b"]) == [2.0]


class Judge:
    """Stands for a sequence-classification model: what building a reward asks of one."""

    def __init__(self, labels=1):
        self.config = SimpleNamespace(num_labels=labels)
        self.training, self.trainable = True, True

    def eval(self):
        self.training = False
        return self

    def requires_grad_(self, wanted):
        self.trainable = wanted


def test_a_model_is_frozen_and_comes_with_its_tokenizer():
    judge = Judge()
    node = {"model": {"name_or_path": "judge"}, "weight": 0.5}
    rewards = build(node, load_model=lambda model: (judge, f"tokenizer of {model['name_or_path']}"))
    assert rewards == Rewards([judge], [0.5], ["tokenizer of judge"])
    assert not judge.training
    assert not judge.trainable


def test_a_model_with_several_labels_is_refused():
    with pytest.raises(ConfigError, match=r"reward\.terms\.j\.model .* 5 labels"):
        build({"terms": {"j": {"model": {"name_or_path": "x"}}}}, load_model=lambda model: (Judge(5), None))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"weight": 1.0}, r"names nothing to score with.*model@reward\.model=pythia160m"),
        ({"model": None, "weight": 1.0}, "names nothing to score with"),
        ({"terms": {}}, "names nothing to score with"),
        ({"terms": {"a": None}}, r"reward\.terms\.a names nothing"),
        ({"function": "length", "model": {"name_or_path": "x"}}, "names function and model"),
        ({"function": "exact"}, r"exact does not exist\. Choose one of .*'exact_match', 'format'"),
        ({"function": "build_rewards"}, "does not exist"),
        ({"function": "length", "unti": "words"}, r"reward\.unti does not exist: length has the options .*'unit'"),
        ({"function": "length", "unit": "bytes"}, "Choose characters or words"),
        ({"function": "format"}, r"needs the option reward\.pattern"),
        ({"function": "format", "pattern": "(a"}, r"'\(a' is no regular expression: missing \)"),
        ({"function": "my.own"}, r"allow_code=\[my\.own\]"),
    ],
)
def test_what_cannot_be_built_is_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        build(node)


def test_a_missing_column_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"needs \['answer'\].*\['kind', 'score'\].*rename.*reward=unique_chars"):
        build({"function": "exact_match"}, columns=["prompt", "kind", "score"])


def test_a_column_that_the_trainer_would_overwrite_is_refused():
    with pytest.raises(ConfigError, match=r"\['completions'\].*rename='\{completions: my_completions\}'"):
        build({"function": "length"}, columns=["prompt", "completions"])


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    text = """
        MARKER = "imported"
        def shout(completions, entry, volume=1.0, **kwargs):
            return [volume * c.count("!") for c in completions]
        async def later(completions, **kwargs):
            return []
    """
    (tmp_path / "own_rewards.py").write_text(re.sub(r"(?m)^ {8}", "", text))
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def test_an_own_function_is_not_even_imported_until_it_is_allowed(own_module):
    with pytest.raises(ConfigError, match="code of your own"):
        build({"function": "own_rewards.shout"}, columns=["prompt", "entry"], allowed=["own_rewards.later"])
    assert own_module not in sys.modules


def test_an_allowed_function_gets_options_and_columns(own_module):
    node = {"function": "own_rewards.shout", "volume": 2.0}
    rewards = build(node, columns=["prompt", "entry"], allowed=["own_rewards.shout"])
    # two marks, each 2.0
    assert rewards.functions[0](["a!!"], prompts=["p"], entry=["e"]) == [4.0]
    assert rewards.functions[0].__name__ == "shout"
    with pytest.raises(ConfigError, match=r"needs \['entry'\]"):
        build(node, columns=["prompt"], allowed=["own_rewards.shout"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_rewards.quiet", "cannot be imported.*quiet"),
        ("own_reward.shout", "cannot be imported.*own_reward"),
        ("own_rewards.later", "write it with def, not async"),
        ("own_rewards.MARKER", "no plain function"),
    ],
)
def test_own_functions_that_are_not_there_are_refused(own_module, name, message):
    with pytest.raises(ConfigError, match=message):
        build({"function": name}, allowed=[name])
