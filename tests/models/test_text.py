"""Texts are read from every source, cut into the windows of the protocol, and refused with a sentence."""

from __future__ import annotations

import gzip
import json
import os
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ModelError, TextError
from gossamer.models.text import (
    Exchange,
    Text,
    calibration_windows,
    default_text,
    evaluation_windows,
    learned_tokens,
    read_text,
    tokenize,
    tuning_windows,
)
from tiny import tiny_tokenizer

PIECES = st.text("ab .,:\n?é文🎈", max_size=12)
PROSE = "The quick brown fox — jumps over 12 dogs.\n\n = Title = \n" * 30


def test_a_plain_file_is_one_document_with_newlines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b" = Title = \r\n a\rb\n\n")
    text = read_text(path)
    assert text == Text((" = Title = \n a\nb\n\n",), "book.txt")
    assert text.joined == " = Title = \n a\nb\n\n"
    assert not text.smoke
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_text(str(tmp_path / "book.txt.gz")).documents == text.documents


def test_jsonl_gives_one_document_a_line(tmp_path: Path) -> None:
    lines = [
        {"id": "x", "text": "one"},
        {"query": "two", "other": "no"},
        {"id": "3", "role": "user", "content": "three"},
        "four \u2028 still four",
        {"text": "  "},
        {"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant")]},
        {"messages": [{"role": role, "content": role} for role in ("user", "assistant")]},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8"
    )
    text = read_text(path)
    several, pair = "system\n\nuser\n\nassistant", Exchange("user", "assistant")
    assert text.documents == ("one", "two", "three", "four \u2028 still four", several, pair)
    assert text.joined == f"one\n\ntwo\n\nthree\n\nfour \u2028 still four\n\n{several}\n\n{pair}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', "line 2 of d.jsonl holds no text.* text, prompt and response, messages, query or"),
        ('{"id": "x7", "title": "not read"}', "line 2 of d.jsonl holds no text"),
        ('{"prompt": "unanswered"}', "line 2 of d.jsonl holds no text"),
        ('{"messages": []}', "line 2 of d.jsonl holds no text"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2 of d.jsonl holds no text"),
        ("[1]", "line 2 of d.jsonl holds no text"),
        ('{"text": ', "line 2 of d.jsonl is no JSON"),
        ("[" * 100_000, "line 2 of d.jsonl is no JSON"),
    ],
)
def test_jsonl_lines_without_text_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / "d.jsonl")


def test_a_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "b" / "z.jsonl").write_text('{"text": "second"}')
    (tmp_path / "b" / "image.png").write_bytes(b"\x89PNG\x00")
    assert read_text(tmp_path) == Text(("first", "second", "third"), tmp_path.name)


def test_strings_are_documents() -> None:
    assert read_text(["a", "", "b"]) == Text(("a", "b"), "given strings")
    with pytest.raises(TextError, match="document 1 of the given text is int"):
        read_text(["a", 5])  # type: ignore[list-item]
    with pytest.raises(TextError, match="a list of strings or paths, or None, not 5"):
        read_text(5)  # type: ignore[arg-type]


def test_strings_that_name_files_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a text").write_text("x")
    for names in (["a.txt", "more/b.jsonl.gz"], [str(tmp_path / "a text")]):
        with pytest.raises(TextError, match=r"these strings are names of files.* give pathlib.Path"):
            read_text(names)
    prose = ["a.txt", "what it says is in a.txt"]
    assert read_text(prose).documents == tuple(prose)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("e.txt", b" \n", "the text e.txt is empty"),
        ("l.txt", b"caf\xe9", "no UTF-8 text: byte 3 is 0xe9"),
        ("n.txt", b"a\0b", "NUL"),
        ("g.txt.gz", b"not gzip", "cannot read the text g.txt.gz"),
        ("h.txt.gz", gzip.compress(b"abc" * 1000, mtime=0)[:-20], "cannot read the text h.txt.gz"),
        ("f.jsonl", b"\n\n", "the text f.jsonl is empty"),
    ],
)
def test_unreadable_texts_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / name)


@pytest.mark.parametrize("source", [[], ["", " "]])
def test_no_document_is_refused(source: list[str]) -> None:
    with pytest.raises(TextError, match="empty"):
        read_text(source)


def test_places_without_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "current").mkdir()
    (tmp_path / "current" / "a.md").write_text("x")
    monkeypatch.chdir(tmp_path / "current")
    for nowhere in ("", "~nobody-of-this-name/text"):
        with pytest.raises(TextError, match="there is no text file or folder"):
            read_text(nowhere)
    tmp_path = tmp_path / "empty"
    tmp_path.mkdir()
    with pytest.raises(TextError, match="holds no text"):
        read_text(tmp_path)
    with pytest.raises(TextError, match="there is no text file or folder"):
        read_text(tmp_path / "missing.txt")


def test_the_built_in_prose_is_split_and_labelled() -> None:
    from pydoc_data.topics import topics

    calibrate, measure = read_text(None), default_text("measure")
    assert calibrate.smoke
    assert measure.smoke
    assert (*calibrate.documents, *measure.documents) == tuple(topics[key] for key in sorted(topics))
    sizes = [sum(map(len, text.documents)) for text in (calibrate, measure)]
    whole = sum(sizes)
    assert sizes[0] <= 0.7 * whole < sizes[0] + len(measure.documents[0])
    assert sizes[1] > 100_000
    with pytest.raises(TextError, match="calibrate and measure"):
        default_text("test")


def test_calibration_windows_follow_the_protocol() -> None:
    text, tokenizer = Text((PROSE,), "prose"), tiny_tokenizer()
    ids = tokenizer(PROSE, add_special_tokens=False).input_ids
    draw = random.Random(7)
    starts = [draw.randint(0, len(ids) - 40 - 1) for _ in range(5)]
    windows = calibration_windows(text, tokenizer, seqlen=40, windows=5, seed=7)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [ids[start : start + 40] for start in starts]
    assert not torch.equal(windows, calibration_windows(text, tokenizer, seqlen=40, windows=5, seed=8))


def test_several_texts_give_as_many_windows_each(tmp_path: Path) -> None:
    tokenizer, paths = tiny_tokenizer(), [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("an apple a day " * 60)
    paths[1].write_text("bees be busy " * 700)  # ten times as long, and drawn from as often
    text = read_text(paths)
    assert text == Text.of([read_text(paths[0]), Text.of([read_text(paths[1])])]) == read_text(text)
    assert text.label == "a.txt + b.txt"
    assert text.joined == f"{paths[0].read_text()}\n\n{paths[1].read_text()}"
    windows = calibration_windows(text, tokenizer, seqlen=16, windows=5, seed=3)
    apart = [
        calibration_windows(read_text(path), tokenizer, seqlen=16, windows=count, seed=3)
        for path, count in zip(paths, (3, 2), strict=True)
    ]
    assert torch.equal(windows[::2], apart[0])
    assert torch.equal(windows[1::2], apart[1])
    (tmp_path / "one").mkdir()
    for path in paths:
        path.rename(tmp_path / "one" / path.name)
    folder = read_text(tmp_path / "one")
    assert folder.documents == text.documents
    assert folder.sha256 != text.sha256


def test_several_texts_need_a_window_of_each(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(PROSE)
    with pytest.raises(TextError, match="1 windows cannot be drawn from 2 texts alike"):
        calibration_windows(read_text(paths), tiny_tokenizer(), seqlen=4, windows=1)
    paths[1].write_text("short")
    with pytest.raises(TextError, match=r"the text b\.txt has .* tokens, but one window needs 65"):
        calibration_windows(read_text(paths), tiny_tokenizer(), seqlen=64, windows=2)


@settings(max_examples=25, deadline=None)
@given(seqlen=st.integers(1, 400), limit=st.none() | st.integers(1, 9))
def test_evaluation_windows_cut_the_text_without_overlap(seqlen: int, limit: int | None) -> None:
    text, tokenizer = Text((PROSE, "more"), "prose"), tiny_tokenizer()
    ids = tokenize(text, tokenizer).tolist()
    assert ids == tokenizer(PROSE + "\n\nmore", add_special_tokens=False).input_ids
    windows = evaluation_windows(text, tokenizer, seqlen, limit)
    assert windows.shape == (min(len(ids) // seqlen, limit or 10**9), seqlen)
    assert windows.flatten().tolist() == ids[: windows.numel()]


def test_texts_shorter_than_a_window_say_what_is_needed() -> None:
    text, tokenizer = Text(("abc",), "t"), tiny_tokenizer()
    count = len(tokenize(text, tokenizer))
    with pytest.raises(TextError, match=rf"the text t has {count} tokens, but one window needs 2,048"):
        evaluation_windows(text, tokenizer, 2048)
    with pytest.raises(TextError, match=rf"has {count} tokens, but one window needs {count + 1}"):
        calibration_windows(text, tokenizer, count, 1)
    assert evaluation_windows(text, tokenizer, count).shape == (1, count)
    assert calibration_windows(text, tokenizer, count - 1, 3).shape == (3, count - 1)


@pytest.mark.parametrize("numbers", [{"seqlen": 0, "windows": 1}, {"seqlen": 4, "windows": 0}])
def test_numbers_below_one_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(TextError, match="at least 1"):
        calibration_windows(Text((PROSE,), "t"), tiny_tokenizer(), **numbers)
    with pytest.raises(TextError, match="limit must be at least 1"):
        evaluation_windows(Text((PROSE,), "t"), tiny_tokenizer(), 8, 0)


def test_the_shared_protocol_has_its_tokens(smollm2: Path, shared_data: Path) -> None:
    """20 windows of 2,048 predict the 40,940 tokens that other tools were measured on."""
    from gossamer.models.tokenizer import load_tokenizer

    text = read_text(shared_data / "text" / "wikitext2_raw_test.txt")
    windows = evaluation_windows(text, load_tokenizer(smollm2), 2048, limit=20)
    assert windows[:, 1:].numel() == 40_940
    assert "\r" not in text.joined


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.txt").write_text("a text")
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(TextError, match="closed: Permission denied"):
        read_text(tmp_path)


def test_an_instruction_set_is_read_in_the_chat_form(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "Hi", "response": "Ho", "own": True},
        {"prompt": "x", "response": "y", "text": "text"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"query": "alone"}]))
    read = read_text(path)
    assert read.documents == (Exchange("Hi", "Ho"), "text", "alone")
    assert read.joined == "Hi\nHo\n\ntext\n\nalone"
    tokenizer = deepcopy(tiny_tokenizer())
    ids, learned = learned_tokens(read, tokenizer)
    assert tokenizer.decode(ids) == "<s>user: Hi</s><s>assistant: Ho</s>text\n\nalone"
    assert torch.equal(ids, tokenize(read, tokenizer))
    assert tokenizer.decode(ids[learned]) == "Ho</s>textalone"
    tokenizer.chat_template = None
    ids, learned = learned_tokens(read, tokenizer)
    assert tokenizer.decode(ids) == read.joined
    assert tokenizer.decode(ids[learned]) == "Hotextalone"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.builds(Exchange, PIECES, PIECES) | PIECES, min_size=1, max_size=4),
    st.booleans(),
)
def test_what_is_learned_is_what_is_answered(documents: list[str | Exchange], chat: bool) -> None:
    """Each token that holds a byte of an answer, but for white space at its end, or of a text beside answers,
    and no other."""
    tokenizer = deepcopy(tiny_tokenizer())
    before, between, after = ("<s>user: ", "</s><s>assistant: ", "</s>") if chat else ("", "\n", "")
    if not chat:
        tokenizer.chat_template = None
    whole, wanted, gap = b"", b"", ""
    for document in documents:
        asked, answered, learned_part = gap, document, document
        if isinstance(document, Exchange):
            asked, answered = asked + before + document.prompt + between, document.response + after
            learned_part = answered.rstrip()
        assert isinstance(answered, str)
        whole += (asked + answered).encode()
        wanted += b" " * len(asked.encode()) + b"x" * len(str(learned_part).encode())
        wanted = wanted.ljust(len(whole))
        gap = "" if chat and isinstance(document, Exchange) else "\n\n"
    if not any(isinstance(document, Exchange) for document in documents):
        wanted = b"x" * len(whole)
    ids, learned = learned_tokens(Text(tuple(documents), "given"), tokenizer)
    at = 0
    for token, is_learned in zip(tokenizer.convert_ids_to_tokens(ids), learned.tolist(), strict=True):
        assert is_learned == (b"x" in wanted[at : at + len(token)])  # of bytes a character each
        at += len(token)
    assert at == len(whole)


def test_windows_without_an_answer_are_left_out() -> None:
    tokenizer = tiny_tokenizer()
    long = Exchange("many words " * 50, "few")
    text = Text((long, Exchange("few", "many words " * 50), long), "given")

    def windows(text: Text, seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuning_windows(text, learned_tokens(text, tokenizer), seqlen)

    ids, learned = windows(text, 16)
    every, all_of_it = evaluation_windows(text, tokenizer, 16), learned_tokens(text, tokenizer)[1]
    flags = all_of_it[: every.numel()].view_as(every)
    kept = flags[:, 1:].any(1)
    assert 0 < kept.sum() < len(every)
    assert torch.equal(ids, every[kept])
    assert torch.equal(learned, flags[kept])
    with pytest.raises(TextError, match="no answers to learn in its windows of 16 tokens"):
        windows(Text((Exchange("many words " * 50, ""),), "given"), 16)
    with pytest.raises(TextError, match="but one window needs 16"):
        windows(Text(("few",), "given"), 16)
    with pytest.raises(TextError, match="seqlen must be at least 1"):
        windows(text, 0)


def test_an_exchange_and_a_text_that_reads_alike_differ() -> None:
    texts = [["a\nb"], [Exchange("a", "b")], [Exchange("b", "a")], ["a", "b"], ["a\n\nb"]]
    assert len({read_text(text).sha256 for text in texts}) == len(texts)
    assert read_text(["a", "b"]).sha256 == Text(("a", "b"), "another name").sha256
    for document in ("\ud800", Exchange("\ud800", "b"), Exchange("a", "\ud800")):
        with pytest.raises(TextError, match="no UTF-8"):
            tokenize(Text((document,), "given"), tiny_tokenizer())


def test_a_tokenizer_without_places_learns_no_answers() -> None:
    class Slow:
        is_fast, chat_template = False, None

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    assert learned_tokens(Text(("abc",), "given"), Slow())[1].all()  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="Slow does not tell where its tokens stand"):
        learned_tokens(Text((Exchange("a", "b"),), "given"), Slow())  # type: ignore[arg-type]
