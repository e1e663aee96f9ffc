"""Prompts and examples as tokens: template only, one BOS, one turn end, no doubled <think>."""

import pytest

from tasks.data.bundled_tokenizer import build_tokenizer
from tasks.data.prompts import encode_example, encode_prompt, render_example, turn_end
from tasks.runtime.stage import StageError

THINKING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% else %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
SWITCH = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def test_prompt_has_one_bos_and_the_generation_prompt(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = encode_prompt(tokenizer, "2+2?", suffix=" Box it.")
    assert tokenizer.decode(ids) == "<s><|user|>2+2? Box it.<|end|><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2? Box it."}], add_generation_prompt=True, return_dict=False
    )


def test_example_is_prompt_then_response_then_turn_end(make_tokenizer):
    tokenizer = make_tokenizer()
    ids, prompt_length = encode_example(tokenizer, "2+2?", "<think>\neasy\n</think>\n\\boxed{4}")
    assert ids[:prompt_length] == encode_prompt(tokenizer, "2+2?")
    assert tokenizer.decode(ids[prompt_length:]) == "<think>\neasy\n</think>\n\\boxed{4}<|end|>"
    assert encode_example(tokenizer, "2+2?", "4<|end|>") == encode_example(tokenizer, "2+2?", "4")


@pytest.mark.parametrize("response", ["<think>\neasy\n</think>\n4", "<think>easy\n</think>\n4", "easy\n</think>\n4"])
def test_think_is_not_doubled_where_the_template_opens_it(make_tokenizer, response):
    tokenizer = make_tokenizer(THINKING)
    prompt_text, response_text = render_example(tokenizer, "2+2?", response)
    assert prompt_text == "<s><|user|>2+2?<|assistant|><think>\n"
    assert response_text == "easy\n</think>\n4</s>"
    ids, prompt_length = encode_example(tokenizer, "2+2?", response)
    assert tokenizer.decode(ids) == prompt_text + response_text
    assert prompt_length == len(encode_prompt(tokenizer, "2+2?"))


def test_turn_end_is_the_templates_else_eos(make_tokenizer):
    assert turn_end(make_tokenizer(eos_token="</s>")) == "<|end|>"
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert turn_end(make_tokenizer(bare, eos_token="</s>")) == "</s>"
    with pytest.raises(StageError, match="EOS"):
        turn_end(make_tokenizer(bare, eos_token=None))


def test_plain_text_counts_every_token(make_tokenizer):
    ids, prompt_length = encode_example(make_tokenizer(), "", "ab")
    assert (len(ids), ids[0], prompt_length) == (3, 0, 0)
    ids, prompt_length = encode_example(make_tokenizer(bos_token=None), "", "ab")
    assert (len(ids), prompt_length) == (2, 0)


def test_thinking_switch(make_tokenizer):
    tokenizer = make_tokenizer(SWITCH)
    assert tokenizer.decode(encode_prompt(tokenizer, "q", enable_thinking=False)).endswith("<think>\n\n</think>\n\n")
    assert encode_prompt(tokenizer, "q", enable_thinking=True) == encode_prompt(tokenizer, "q")
    with pytest.raises(StageError, match="enable_thinking"):
        encode_prompt(make_tokenizer(), "q", enable_thinking=False)


def test_without_template_or_prompt(make_tokenizer):
    with pytest.raises(StageError, match="no chat template"):
        encode_prompt(make_tokenizer(None), "q")
    with pytest.raises(ValueError, match="empty"):
        encode_prompt(make_tokenizer(), "")


def test_bundled_tokenizer(make_tokenizer):
    tokenizer = build_tokenizer()
    ids, prompt_length = encode_example(tokenizer, "Mia has 3 pens.", "<think>\nstart 3\n</think>\n\\boxed{3}")
    assert tokenizer.decode(ids[:prompt_length]) == "<|user|>Mia has 3 pens.<|end|><|assistant|>"
    assert tokenizer.decode(ids[prompt_length:]) == "<think>\nstart 3\n</think>\n\\boxed{3}<|end|>"
    assert ids[-1] == tokenizer.eos_token_id
