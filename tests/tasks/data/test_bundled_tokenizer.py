import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tasks.data.bundled_problems import bundled_problems, bundled_stories
from tasks.data.bundled_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Saved and loaded again, as everybody but pretrain gets it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_bundled_texts_need_no_byte_tokens_and_survive(tokenizer):
    for row in bundled_problems("test", 300, seed=9) + bundled_stories("test", 100, seed=9):
        for text in (row["prompt"], row["response"]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert not [token for token in tokenizer.convert_ids_to_tokens(ids) if token.startswith("<0x")]


def test_any_text_survives(tokenizer):
    @given(st.text())
    def survives(text):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    survives()


def test_every_digit_is_one_token_wherever_it_stands(tokenizer):
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("7", "27 + 7 = 34", " 77 coins")]
    seven = sequences[0][0]
    assert [ids.count(seven) for ids in sequences] == [1, 2, 2]


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Q"}]
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == "<|user|>Q<|end|><|assistant|>"
    closed = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "A"}], tokenize=False)
    assert closed == opened + "A<|end|>"
    with pytest.raises(Exception, match="user and assistant only"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_reasoning_marks_survive_decoding_and_the_turn_end_does_not(tokenizer):
    ids = tokenizer("<think>\nstart 3\n</think>\n\\boxed{3}<|end|>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nstart 3\n</think>\n\\boxed{3}"


def test_building_is_deterministic():
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()
