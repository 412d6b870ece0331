"""Tokens become text character by character, and prompts take the form that a model was trained on."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ModelError, TextError
from gossamer.models.tokenizer import (
    StreamDecoder,
    encode_prompt,
    encode_turns,
    format_exchange,
    load_tokenizer,
)
from tiny import tiny_folder, tiny_tokenizer


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_streamed_text_is_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = [decoder.push(token) for token in ids]
    assert "".join([*pieces, decoder.finish()]) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 383), max_size=40))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    """Bytes that are no UTF-8 included."""
    tokenizer = tiny_tokenizer()
    decoder = StreamDecoder(tokenizer)
    streamed = "".join([*(decoder.push(token) for token in ids), decoder.finish()])
    assert streamed == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = tiny_tokenizer()
    ids = [token for char in "a日b" for token in tokenizer(char, add_special_tokens=False).input_ids]
    assert len(ids) == 5  # 日 is three bytes, and three tokens here
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in ids] == ["a", "", "", "日", "b"]
    assert decoder.finish() == ""


def test_what_is_held_back_comes_at_the_end_and_the_decoder_starts_anew() -> None:
    tokenizer = tiny_tokenizer()
    decoder = StreamDecoder(tokenizer)
    first = tokenizer("日", add_special_tokens=False).input_ids[0]
    assert decoder.push(first) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(tokenizer("x", add_special_tokens=False).input_ids[0]) == "x"


def test_special_tokens_are_left_out() -> None:
    tokenizer = tiny_tokenizer()
    decoder = StreamDecoder(tokenizer)
    x = tokenizer("x", add_special_tokens=False).input_ids[0]
    assert "".join(decoder.push(token) for token in (1, x, 2, x, 2)) == "xx"


def test_what_never_becomes_text_costs_no_more_than_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of bytes that are no UTF-8, and of special tokens, are not decoded as a whole at each token."""
    tokenizer = tiny_tokenizer()
    start = tokenizer("日", add_special_tokens=False).input_ids[0]
    letter = tokenizer("日", add_special_tokens=False).input_ids
    decoded: list[int] = []
    inner = type(tokenizer).decode

    def counting(self: object, ids: list[int], **options: object) -> str:
        decoded.append(len(ids))
        return inner(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counting)
    for run in ([start] * 600, [2] * 600):
        decoded.clear()
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(token) for token in (*run, *letter, *letter)]
        assert "".join(pieces) == ("\ufffd" * 600 if run[0] == start else "") + "日日"
        assert sum(decoded) < 20 * 600


def test_leading_spaces_of_sentencepiece_words_survive() -> None:
    """Such tokenizers drop the space of a text's first word, so words decoded alone would run together."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    decoder = StreamDecoder(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert [decoder.push(token) for token in (1, 2, 3)] == ["Hello", " world", "!"]


def test_long_words_of_byte_tokens_appear_letter_by_letter() -> None:
    """Tokenizers with byte fallback decode a run of bytes as a whole, so its last bytes alone say little."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}, "<unk>"))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    decoder = StreamDecoder(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    pieces = [decoder.push(byte + 1) for byte in "日本日本".encode()]
    assert pieces == ["", "", "日", "", "", "本"] * 2


def byte_fallback_tokenizer() -> Any:
    """As Llama 2 has it: words with a mark for their space, and bytes for what is in no word."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁ehlo,é", "he", "lo", "▁he"]
    merges = [("h", "e"), ("l", "o"), ("▁", "he")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.one_of(st.sampled_from("hello, é日😀"), st.characters(exclude_categories=["Cs"])), max_size=40)
)
def test_text_of_a_tokenizer_with_byte_fallback_is_the_text(text: str) -> None:
    text = text.replace("▁", " ")
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoder = StreamDecoder(tokenizer)
    pieces = [*(decoder.push(token) for token in ids), decoder.finish()]
    assert "".join(pieces) == text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_broken_run_of_bytes_keeps_the_characters_that_were_whole() -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["h", "<0xE6>", "<0x97>", "<0xA5>", "<0xE6>", "e"])
    decoder = StreamDecoder(tokenizer)
    streamed = "".join([*(decoder.push(token) for token in ids), decoder.finish()])
    assert re.fullmatch("h日\ufffd{1,3}e", streamed)
    assert tokenizer.decode(ids) == "h" + 4 * "\ufffd" + "e"


def test_chat_form() -> None:
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, "Hi")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 2  # the template's own, and no third
    assert tokenizer.decode(ids) == "<s>user: Hi</s><s>assistant: "
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", chat=False)) == "Hi"


def test_an_exchange_falls_apart_where_the_answer_begins() -> None:
    tokenizer = deepcopy(tiny_tokenizer())
    assert format_exchange(tokenizer, "Hi", "Ho") == ("<s>user: Hi</s><s>assistant: ", "Ho</s>")
    assert format_exchange(tokenizer, "Hi", "") == ("<s>user: Hi</s><s>assistant: ", "</s>")
    assert format_exchange(tokenizer, "Hi", "\0o") == ("<s>user: Hi</s><s>assistant: ", "\0o</s>")
    # forms that trim, and that write something before the last answer which no prompt ends with
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if loop.last %}<think></think>{% endif %}"
        "{{ m['content'] | trim }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert format_exchange(tokenizer, "Hi", " Ho ") == ("[user]Hi;[assistant]<think></think>", "Ho;")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match="leaves the answer of a conversation out"):
        format_exchange(tokenizer, "Hi", "Ho")
    tokenizer.chat_template = None
    assert format_exchange(tokenizer, "Hi", "Ho") == ("Hi\n", "Ho")


def test_without_a_template_a_prompt_is_plain_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "m"))
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi")) == "Hi"


def test_a_failing_template_is_an_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "m"))
    tokenizer.chat_template = "{{ raise_exception('only users may speak') }}"
    with pytest.raises(ModelError, match="only users may speak"):
        encode_turns(tokenizer, [{"role": "system", "content": "x"}])


@pytest.mark.parametrize("turn", [{"role": "user"}, {"role": "user", "content": None}])
def test_turns_without_content_are_refused(turn: Any) -> None:
    with pytest.raises(TextError, match="turn 1 of the conversation has no text"):
        encode_turns(tiny_tokenizer(), [{"role": "user", "content": "x"}, turn])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"it lacks tokenizer\.json and tokenizer_config\.json, which the original model has: copy"),
        ({"tokenizer_config.json": "{}"}, r"it lacks tokenizer\.json, which"),
        ({"tokenizer.json": "{"}, "line 1 column 2"),
        ({"tokenizer.json": "{}"}, "added_tokens"),
        ({"tokenizer.model": "x"}, "."),
    ],
)
def test_folders_without_a_tokenizer_are_refused(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=rf"has no tokenizer that can be loaded: .*{says}") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_smollm2_chats(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    ids = encode_prompt(tokenizer, "Hi")
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"


def test_what_is_no_utf8_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    for chat in (True, False):
        with pytest.raises(TextError, match=r"no UTF-8: character 4 is '\\udce9'"):
            encode_prompt(tokenizer, "caf\udce9", chat=chat)
