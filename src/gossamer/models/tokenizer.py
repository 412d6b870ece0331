"""Text to tokens and back: the tokenizer of a folder, chat prompts, and text that appears token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.errors import ModelError, TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_FILES = ("tokenizer.json", "tokenizer_config.json")
_LONGEST = 4  # bytes of a character in UTF-8, and so tokens at most


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder. Nothing is fetched, and no code of the folder runs.
    Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # damaged tokenizer files raise whatever their parser raises
        reason = " ".join(str(error).split()) or type(error).__name__
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            missing = [name for name in _FILES if not (folder / name).is_file()]
            reason = f"it lacks {' and '.join(missing)}, which the original model has: copy what is missing"
        raise ModelError(f"{folder.name} has no tokenizer that can be loaded: {reason}") from error
    return tokenizer


def format_exchange(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[str, str]:
    """A user's turn and the model's answer in its own chat form: the text up to the answer, and the answer
    with the end that the form gives it. Where the tokenizer has no chat template, the prompt as a line, and
    the response. Raises ModelError where the template refuses them, or leaves the response out."""
    if not tokenizer.chat_template:
        return f"{prompt}\n", response

    def whole(answer: str) -> str:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return _format(tokenizer, turns, answering=False)

    for part in (prompt, response):
        check_utf8(part)
    # answers that share no character
    text, other = whole(response), whole("\1" if response.startswith("\0") else "\0")
    asked = "".join(c for c, _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))
    if response.strip() and asked == text:
        raise ModelError("the model's chat template leaves the answer of a conversation out")
    return asked, text[len(asked) :]


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the model answers; each turn has a ``role`` ("system", "user",
    "assistant") and its ``content``. Raises ModelError where the chat template refuses them, and TextError
    for a turn without content, and what is no UTF-8."""
    for i, turn in enumerate(turns):
        if not isinstance(content := turn.get("content"), str):
            raise TextError(f"turn {i} of the conversation has no text as its content: {content!r}")
        check_utf8(content)
    text = _format(tokenizer, turns)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _format(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], *, answering: bool = True
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answering
        )
    except Exception as error:  # templates are programs and raise their own errors
        raise ModelError(f"the model's chat template fails: {error}") from error
    assert isinstance(text, str)
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = True) -> list[int]:
    """Token ids of ``prompt``: in chat form, whose template writes all special tokens itself; with ``chat``
    off or without a template as plain text, with the special tokens that the tokenizer puts first."""
    if chat and tokenizer.chat_template:
        return encode_turns(tokenizer, [{"role": "user", "content": prompt}])
    check_utf8(prompt)
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    return ids


def check_utf8(text: str) -> None:
    """Raises TextError for what is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that were no UTF-8, as Python holds them
        raise TextError(
            f"the text is no UTF-8: character {error.start + 1} is {text[error.start]!a}"
        ) from error


class StreamDecoder:
    """Turns tokens into text as they come, holding back a character until its last byte is there.

    ``push`` returns the new text (often ""), ``finish`` what is left; joined they are the decoded whole, in
    which bytes that are no UTF-8 become U+FFFD. Special tokens are left out. A tokenizer with byte fallback
    makes a whole run of byte tokens U+FFFD where one of them is no UTF-8: what was given out of it before
    stays, so that there are fewer of these than in the decoded whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._ids: list[int] = []
        # text of ids[start:told] has been given out; it is decoded again each time since tokenizers
        # treat a text's first token in their own way (leading space)
        self._start = 0
        self._told = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        if token in self._special:
            return ""
        self._ids.append(int(token))
        if self._hopeless():
            return ""
        text = self._fresh()
        if text.endswith(_REPLACEMENT) or not text:
            return ""
        self._start, self._told = self._told, len(self._ids)
        return text

    def finish(self) -> str:
        """What has been held back; the decoder is empty afterwards."""
        text = self._fresh()
        self._ids, self._start, self._told = [], 0, 0
        return text

    def _hopeless(self) -> bool:
        """Whether a long run still ends within a character: its last tokens tell, without decoding it all."""
        long = len(self._ids) - self._told > _LONGEST
        return long and self._decode(self._ids[-_LONGEST:]).endswith(_REPLACEMENT)

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._start : self._told])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
