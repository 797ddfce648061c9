from pathlib import Path

import pytest
import trl
from tiny import TEMPLATE, tiny_tokenizer

from runner import rendering
from runner.errors import ConfigError


def chats(count, **more):
    """Return pairs of a prompt and an answer, each like no other."""
    return [
        ([{"role": "user", "content": "z" * n, **more}], [{"role": "assistant", "content": "q" * n, **more}])
        for n in range(count)
    ]


def written(pairs, tokenizer, rows=None):
    numbered = [(number, *pair) for number, pair in enumerate(pairs)]
    return rendering.render(rows or [{}] * len(pairs), numbered, tokenizer, 1, tools=True)


def by_transformers(pairs, tokenizer, **told):
    return [
        (
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **told),
            tokenizer.apply_chat_template(prompt + answer, tokenize=False, **told),
        )
        for prompt, answer in pairs
    ]


def test_chats_are_as_transformers_writes_them_one_by_one():
    pairs, tokenizer = chats(20), tiny_tokenizer()
    assert written(pairs, tokenizer) == by_transformers(pairs, tokenizer)


def test_a_key_without_a_value_is_as_if_it_were_not_there():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if messages[0].name is defined %}{{ '<|tool|>' }}{% endif %}"
    assert written(chats(20, name=None), tokenizer) == by_transformers(chats(20), tokenizer)


TRIMMED = (
    "{% for m in messages %}\n  {%- generation -%}\n  {% set last = m.content %} {{ last }}\n  {%+ endgeneration +%}\n"
    "{{ last or 'unset' }}{% endfor %}"
)
TRLS = [Path(trl.__file__).with_name("chat_templates") / f"{name}_training.jinja" for name in
        ("deepseekv3", "gemma", "glm4moe", "llama3", "phi3", "qwen2_5", "qwen3")]  # fmt: skip


@pytest.mark.parametrize("template", [TRIMMED, *(path.read_text() for path in TRLS)])
def test_marks_around_what_is_learnt_leave_the_text_as_it_is(template):
    tokenizer, pairs = tiny_tokenizer(), chats(3)
    tokenizer.chat_template = template
    assert rendering.MARKS.search(template)
    assert written(pairs, tokenizer) == by_transformers(pairs, tokenizer)


def test_what_else_a_message_and_a_row_hold_is_told_to_the_template():
    tokenizer, pairs = tiny_tokenizer(), chats(20)
    tokenizer.chat_template = TEMPLATE + "{{ messages[0].reasoning_content }}{{ tools }}{{ loud }}"
    pairs[-1][0][0]["thinking"] = "zzz"  # which transformers also calls reasoning_content
    made = written(pairs, tokenizer)
    assert made == by_transformers(pairs, tokenizer)
    assert made[-1][0].endswith("zzzNone")
    rows = [{"tools": [{"name": "add"}], "chat_template_kwargs": {"loud": True}}] * len(pairs)
    told = {"tools": rows[0]["tools"], "loud": True}
    assert written(pairs, tokenizer, rows) == by_transformers(pairs, tokenizer, **told)


def test_a_row_cannot_say_whether_an_answer_is_asked_for():
    rows = [{"chat_template_kwargs": {"add_generation_prompt": True}}]
    with pytest.raises(ConfigError, match=r"row 1: .*add_generation_prompt"):
        written(chats(1), tiny_tokenizer(), rows)


def test_a_message_keeps_the_order_of_its_keys():
    tokenizer, pairs = tiny_tokenizer(), chats(20)
    tokenizer.chat_template = "{% for message in messages %}{{ message | tojson }}{% endfor %}"
    pairs[-1] = tuple([dict(reversed(message.items())) for message in part] for part in pairs[-1])
    assert written(pairs, tokenizer) == by_transformers(pairs, tokenizer)


def test_a_tokenizer_with_its_own_way_to_write_chats_keeps_it():
    class Own(type(tiny_tokenizer())):
        def apply_chat_template(self, chats, **told):
            return ["mine"] * len(chats)

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Own
    assert written(chats(20), tokenizer) == [("mine", "mine")] * (20)
