"""Text in, windows of tokens out: what models are calibrated and measured on."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.errors import ModelError, TextError
from gossamer.models.tokenizer import check_utf8, format_exchange
from gossamer.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Exchange:
    """A document that is an instruction and its answer, of which tuning learns the answer alone."""

    prompt: str
    response: str

    def __str__(self) -> str:
        return f"{self.prompt}\n{self.response}"


Document = str | Exchange

SEPARATOR = "\n\n"
BUILT_IN = "python-topics"
_CALIBRATION_SHARE = 0.7
_TEXT_NAMES = (".txt", ".txt.gz", ".md", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Text:
    """Documents, and how reports name them. ``smoke``: the prose built into Python, on which a figure is no
    measurement but a smoke test, and is labelled so. ``sources``: where it is several texts, each of them."""

    documents: tuple[Document, ...]
    label: str
    smoke: bool = False
    sources: tuple[Text, ...] = ()

    @classmethod
    def of(cls, texts: Iterable[Text]) -> Text:
        """Several texts as one, of which windows of calibration are drawn from each alike."""
        flat = tuple(one for text in texts for one in text.sources or (text,))
        if len(flat) == 1:
            return flat[0]
        documents = tuple(document for text in flat for document in text.documents)
        return cls(documents, " + ".join(text.label for text in flat), any(t.smoke for t in flat), flat)

    @property
    def joined(self) -> str:
        """All documents as one string, with an empty line between them."""
        return SEPARATOR.join(map(str, self.documents))

    @property
    def sha256(self) -> str:
        """Of the documents, which differs where an exchange and a text that read alike do, and where the same
        ones are one text or several."""
        if self.sources:
            return hashlib.sha256("".join(text.sha256 for text in self.sources).encode()).hexdigest()
        told = [document if isinstance(document, str) else asdict(document) for document in self.documents]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


TextSource = str | Path | Text | Sequence[Document] | Sequence[Path] | None
"""What `read_text` takes: a file or folder, several of them, documents, or None for the built-in prose."""


def read_text(source: TextSource, part: str = "calibrate") -> Text:
    """The text that ``source`` names.

    - a file: one document (UTF-8; ``.gz`` is unpacked; line ends become newlines);
    - a ``.jsonl`` or ``.jsonl.gz`` file: one document a line: a string, or of an object the string under
      ``text``, else those under ``prompt`` and ``response`` (an `Exchange`), else the contents of its
      ``messages`` (an `Exchange` where they are a user's and an assistant's, else with an empty line between
      them), else the string under ``query``, else under ``content``;
    - a folder: its .txt, .md and .jsonl files (and .gz of them), also in folders below, sorted by path;
    - a sequence of strings or exchanges: those documents;
    - a sequence of `pathlib.Path`: the text of each, from each of which as many windows of calibration are
      drawn;
    - None: `default_text` of ``part``.

    Empty documents are left out. Raises TextError: nothing there, not UTF-8, binary, no document, strings
    that name files.
    """
    if source is None:
        return default_text(part)
    if isinstance(source, Text):
        return source
    if not isinstance(source, (Path, Iterable)):
        raise TextError(f"a text is a path, a list of strings or paths, or None, not {source!r}")
    if not isinstance(source, (str, Path)):
        documents, label = list[Any](source), "given strings"
        if documents and all(isinstance(document, Path) for document in documents):
            return Text.of(read_text(path) for path in documents)
        if documents and all(isinstance(one, str) and _names_file(one) for one in documents):
            raise TextError(
                f"these strings are names of files, such as {documents[0]!r}: give pathlib.Path for files"
            )
        for i, document in enumerate(documents):
            if not isinstance(document, Document):
                kind = type(document).__name__
                raise TextError(f"document {i} of the given text is {kind}, not a string or an Exchange")
    else:
        path = expanded(source)
        label = path.resolve().name
        if str(source) and path.is_dir():  # "" is none, though a Path of it is
            documents = [document for file in _text_files(path) for document in _read_file(file)]
        elif path.is_file():
            documents = list(_read_file(path))
        else:
            raise TextError(f"there is no text file or folder {str(source)!r}")
    documents = [document for document in documents if str(document).strip()]
    if not documents:
        raise TextError(f"the text {label} is empty")
    return Text(tuple(documents), label)


def default_text(part: str = "calibrate") -> Text:
    """English prose that every Python carries (``pydoc_data.topics``, sorted by key): of its characters the
    first 70 %, in whole documents, for ``calibrate``, the rest for ``measure``. It differs a little between
    releases of Python."""
    from pydoc_data.topics import topics

    if part not in ("calibrate", "measure"):
        raise TextError(f"the built-in text has the parts calibrate and measure, not {part!r}")
    documents = [topics[key] for key in sorted(topics)]
    room = _CALIBRATION_SHARE * sum(map(len, documents))
    cut = 0
    while cut < len(documents) and room >= len(documents[cut]):
        room -= len(documents[cut])
        cut += 1
    chosen = documents[:cut] if part == "calibrate" else documents[cut:]
    return Text(tuple(chosen), BUILT_IN, smoke=True)


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token ids (int64) of all documents as one string, without special tokens but those of the chat
    form that exchanges are in."""
    return _encode(_whole(text, tokenizer)[0], tokenizer)[0]


def learned_tokens(text: Text, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """The ids of `tokenize`, and bool of the same shape: whether tuning learns the token, which it does of
    texts all, and of exchanges the answer with the end that the chat form gives it, but for white space at
    the end. Raises ModelError where the tokenizer does not tell the places of its tokens in a text that has
    exchanges."""
    whole, learned = _whole(text, tokenizer)
    if not any(isinstance(document, Exchange) for document in text.documents):
        ids, _ = _encode(whole, tokenizer)
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in a text, so that answers "
            "cannot be told from what is asked: a fast tokenizer does"
        )
    ids, places = _encode(whole, tokenizer, places=True)
    begins, stops = torch.tensor(learned).T.contiguous()
    starts, ends = places.T.contiguous()
    document = (torch.searchsorted(begins, ends) - 1).clamp_min(0)  # the last that begins before the end
    some = begins[document] < stops[document]
    return ids, some & (ends > begins[document]) & (starts < stops[document])


def _whole(text: Text, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """All documents as the model reads them, and from where to where each is learned. An empty line stands
    between them, but not behind one in chat form, which ends by itself."""
    forms: list[str] = []
    learned, at, between = [], 0, ""
    for document in text.documents:
        if isinstance(document, Exchange):
            asked, answered = format_exchange(tokenizer, document.prompt, document.response)
            told, after = answered.rstrip(), "" if tokenizer.chat_template else SEPARATOR
        else:
            asked, answered, told, after = "", document, document, SEPARATOR
        at += len(between + asked)
        learned.append((at, at + len(told)))
        forms.append(between + asked + answered)
        at, between = at + len(answered), after
    return "".join(forms), learned


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, *, places: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids, and with ``places`` the characters ``(tokens, 2)`` from which to which each one stands."""
    check_utf8(text)
    found = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=places,
        truncation=False,
        verbose=False,
    )
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    return ids, torch.tensor(found["offset_mapping"] if places else [], dtype=torch.int64).reshape(-1, 2)


def calibration_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, seqlen: int, windows: int, seed: int = 0
) -> Tensor:
    """Token ids ``(windows, seqlen)`` from random places of ``text``, the same for the same seed.

    The text is tokenised once without special tokens; windows start at Python's
    ``random.Random(seed).randint(0, tokens - seqlen - 1)``, one draw each, as in the calibration of the
    SparseGPT and Wanda repositories. Of several texts each gives every n-th window, so that as many windows
    of each are there, the first ones one more where they do not divide. Raises TextError where a text is
    shorter than one window, or there are fewer windows than texts.
    """
    _check_positive(seqlen=seqlen, windows=windows)
    sources = text.sources or (text,)
    check_shares(len(sources), windows)
    found = torch.empty(windows, seqlen, dtype=torch.int64)
    for i, source in enumerate(sources):
        ids = tokenize(source, tokenizer)
        _check_length(source, len(ids), seqlen + 1)
        draw = random.Random(seed)
        for window in found[i :: len(sources)]:
            start = draw.randint(0, len(ids) - seqlen - 1)
            window.copy_(ids[start : start + seqlen])
    return found


def check_shares(texts: int, windows: int) -> None:
    """Raises TextError where ``windows`` are too few for each of so many texts to give one."""
    if windows < texts:
        raise TextError(f"{windows} windows cannot be drawn from {texts} texts alike: take more windows")


def evaluation_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, seqlen: int = 2048, limit: int | None = None
) -> Tensor:
    """Token ids ``(n, seqlen)``: ``text`` tokenised once without special tokens, cut from the start without
    overlap, at most ``limit`` windows; the rest that fills no window is left out. Raises TextError where
    the text is shorter than one window."""
    _check_positive(seqlen=seqlen, limit=1 if limit is None else limit)
    ids = tokenize(text, tokenizer)
    _check_length(text, len(ids), seqlen)
    return _cut(ids, seqlen, limit)


def tuning_windows(text: Text, tokens: tuple[Tensor, Tensor], seqlen: int) -> tuple[Tensor, Tensor]:
    """Token ids ``(n, seqlen)`` as of `evaluation_windows`, and bool of the same shape: which of them are
    learned, of the ``tokens`` that `learned_tokens` gives for ``text``. Windows in which none is, but perhaps
    the first, are left out. Raises TextError where no window is left."""
    _check_positive(seqlen=seqlen)
    ids, learned = tokens
    _check_length(text, len(ids), seqlen)
    ids, learned = _cut(ids, seqlen), _cut(learned, seqlen)
    some = learned[:, 1:].any(1)
    if not some.any():
        raise TextError(f"the text {text.label} has no answers to learn in its windows of {seqlen} tokens")
    return ids[some], learned[some]


def _cut(tokens: Tensor, seqlen: int, limit: int | None = None) -> Tensor:
    count = len(tokens) // seqlen
    count = count if limit is None else min(count, limit)
    return tokens[: count * seqlen].reshape(count, seqlen)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise TextError(f"{name} must be at least 1, got {number}")


def _check_length(text: Text, tokens: int, needed: int) -> None:
    if tokens < needed:
        raise TextError(
            f"the text {text.label} has {tokens:,} tokens, but one window needs {needed:,}: give more text, "
            "or shorter windows"
        )


def _names_file(document: str) -> bool:
    """Whether a string is there as a file, or is one word that ends as names of texts do."""
    return os.path.isfile(document) or (document.endswith(_TEXT_NAMES) and len(document.split()) == 1)


def _text_files(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise TextError(f"cannot read {error.filename}: {error.strerror}") from error

    files = []
    for root, _, names in os.walk(folder, onerror=fail):
        paths = [Path(root, name) for name in names if name.endswith(_TEXT_NAMES)]
        try:
            files += [path for path in paths if path.is_file()]
        except OSError as error:
            fail(error)
    if not files:
        raise TextError(f"the folder {folder.resolve().name} holds no text: no {', '.join(_TEXT_NAMES)} file")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _read_file(path: Path) -> Iterator[Document]:
    try:
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"cannot read the text {path.name}: {error}") from error
    try:
        whole = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path.name} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}"
        ) from error
    if "\0" in whole:
        raise TextError(f"{path.name} is no text: it holds NUL bytes")
    # as text files are read everywhere: \r costs a tokenizer dear, and perplexity several percent
    whole = whole.replace("\r\n", "\n").replace("\r", "\n")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        # not splitlines(): JSON strings may hold U+2028 and its like as they are
        for number, line in enumerate(whole.split("\n"), 1):
            if line.strip():
                yield _document(line, f"line {number} of {path.name}")
    else:
        yield whole


def _document(line: str, where: str) -> Document:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where} is no JSON: {error}") from error
    match record:
        case str(text) | {"text": str(text)}:
            return text
        case {"prompt": str(prompt), "response": str(response)}:
            return Exchange(prompt, response)
        case {
            "messages": [
                {"role": "user", "content": str(prompt)},
                {"role": "assistant", "content": str(response)},
            ]
        }:
            return Exchange(prompt, response)
        case {"messages": [_, *_] as turns} if all(_has_content(turn) for turn in turns):
            return SEPARATOR.join(turn["content"] for turn in turns)
        case {"query": str(text)} | {"content": str(text)}:
            return text
    raise TextError(
        f"{where} holds no text: neither a string nor an object with text, prompt and response, messages, "
        "query or content"
    )


def _has_content(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("content"), str)
