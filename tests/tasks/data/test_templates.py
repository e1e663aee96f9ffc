"""Chat templates: no clock, no chance, no end without measure; what cannot be used is one short message."""

import datetime

import pytest
import transformers.utils.chat_template_utils as transformers_templates

from tasks.data import templates
from tasks.data.prompts import encode_example, encode_prompt, render_prompt, turn_end
from tasks.runtime.stage import StageError

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA = (
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ 'Today Date: ' + date_string }}"
)
HARMONY = (
    "{% macro system() %}{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}{% endmacro %}"
    "{{ system() }}{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
)


@pytest.fixture
def days(monkeypatch):
    """Calls a function on two days."""

    def on_two_days(call):
        found = []
        for day in (27, 30):
            clock = type("Clock", (datetime.datetime,), {"now": classmethod(lambda c, tz=None, d=day: c(2026, 11, d))})
            monkeypatch.setattr(transformers_templates, "datetime", clock)
            found.append(call())
        return found

    return on_two_days


@pytest.mark.parametrize("template, date", [(LLAMA + CHAT, "26 Jul 2024"), (HARMONY, "2024-07-26")])
def test_the_clock_stands_still(make_tokenizer, days, template, date):
    tokenizer = make_tokenizer(template)
    first, second = days(
        lambda: (render_prompt(tokenizer, "q"), encode_example(tokenizer, "q", "a"), turn_end(tokenizer))
    )
    assert first == second
    assert date in first[0]


LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
HOSTILE = {
    "syntax": "{% for m in messages %}{{ m['content'] ",
    "undefined": CHAT + "{{ tools_prompt.header }}",
    "unknown tag": CHAT + "{% frobnicate %}",
    "unknown filter": CHAT + "{{ messages | frobnicate }}",
    "division": CHAT + "{{ 1 // 0 }}",
    "type": CHAT + "{{ 'a' + 1 }}",
    "key": CHAT + "{{ messages[7].content + 'a' }}",
    "refuses": "{{ raise_exception('no conversation please\n' * 500) }}",
    "unsafe": CHAT + "{{ messages.__class__.__mro__ }}",
    "mutates": CHAT + "{{ messages.append(1) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}" + CHAT,
    "include": CHAT + "{% include 'other' %}",
    "nested loops": CHAT + LOOPS,
    "long output": CHAT + "{% for a in range(99999) %}{{ 'many characters' }}{% endfor %}",
    "multiplied text": CHAT + "{{ ('a' * 9999999999) | length }}",
    "power": CHAT + "{{ (9 ** (9 ** 9)) % 7 }}",
    "switched bomb": CHAT + "{% if enable_thinking %}" + LOOPS + "{% endif %}",
    "random": CHAT + "{{ ['a', 'b'] | random }}",
    "lipsum": CHAT + "{{ lipsum(1) }}",
    "address": CHAT + "{{ messages.copy }}",
    "no user": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}",
    "no assistant": "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
    "constant": "{{ 'hello' }}",
    "binary": "\x00\x01\ud83d",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_one_short_message(make_tokenizer, template, monkeypatch):
    monkeypatch.setattr(templates, "CPU_SECONDS", 1)
    with pytest.raises(StageError, match=r"chat_template.*(mend|take another)") as told:
        encode_prompt(make_tokenizer(template), "q")
    message = str(told.value)
    assert len(message) <= 300 and message.isprintable()
    with pytest.raises(StageError, match="chat_template"):
        templates.check_chat_template(make_tokenizer(template))


def test_a_checked_template_is_not_probed_again(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(CHAT)
    render_prompt(tokenizer, "q")
    monkeypatch.setattr(templates, "check_chat_template", None)
    assert render_prompt(make_tokenizer(CHAT), "other").startswith("<|user|>other")


def test_the_error_of_one_conversation_is_told_too(make_tokenizer):
    tokenizer = make_tokenizer(CHAT + "{% if 'x' in messages[0]['content'] %}{{ raise_exception('no x') }}{% endif %}")
    render_prompt(tokenizer, "q")
    with pytest.raises(StageError, match=r"chat_template.*no x"):
        render_prompt(tokenizer, "x")
