"""What must hold when things last or go wrong: memory, Ctrl-C, exceptions, forks, damaged models."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import kernels
from gossamer.engine import Decoder, NativeSession, why_not
from gossamer.errors import ModelError
from gossamer.models.generate import generate
from gossamer.models.session import PrefixSession
from gossamer.recipes.load import load
from tiny import tiny_folder, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

ENDLESS = 10**6  # positions: more than any test here uses
WAIT = 120  # seconds: imports of a busy machine take their time
TESTS = Path(__file__).parents[1]


def endless(**changes: Any) -> Any:
    return tiny_model("llama", max_position_embeddings=ENDLESS, **changes)


def greedy(model: Any, session: PrefixSession, ids: Tensor, count: int = ENDLESS // 2) -> Iterator[int]:
    return (token.id for token in generate(model, ids.tolist(), count, session=session))


def threads_alive() -> int:
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()


@contextmanager
def ctrl_c_when(reached: Callable[[], bool]) -> Iterator[None]:
    """Sends this process a SIGINT once ``reached()`` while the block runs, which must end by it."""
    over = threading.Event()

    def press() -> None:
        while not over.is_set() and not reached():
            time.sleep(0.0002)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


# ---- Ctrl-C and exceptions


def test_ctrl_c_in_a_prompt_leaves_the_session_as_it_was() -> None:
    decoder, ids = Decoder(endless()), tiny_tokens(1, 60)[0]
    session = NativeSession(decoder)
    session.prompt(ids[:20])
    size, threads = session.nbytes, threads_alive() + 1  # and the one that presses
    alive: list[int] = []

    def reached() -> bool:
        alive[:] = [threads_alive()]
        return session.length > 1024

    with ctrl_c_when(reached):
        session.prompt(tiny_tokens(1, 100_000)[0])
    assert session.length == 20
    assert session.nbytes == size
    assert alive == [threads]  # none were started for the long prompt, and so none are left
    again = NativeSession(decoder)
    again.prompt(ids[:20])
    assert torch.equal(session.logits(ids[20:]), again.logits(ids[20:]))


def test_ctrl_c_while_tokens_are_written_and_on_from_there() -> None:
    model, ids = endless(), tiny_tokens(1, 20)[0]
    decoder = Decoder(model)
    session = PrefixSession(partial(NativeSession, decoder))
    written: list[int] = []
    with ctrl_c_when(lambda: len(written) > 50):
        for token in greedy(model, session, ids):
            written.append(token)
    on = islice(greedy(model, session, torch.tensor([*ids, *written])), 20)
    whole = greedy(model, PrefixSession(partial(NativeSession, decoder)), ids)
    assert [*written, *on] == list(islice(whole, len(written) + 20))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("call", range(4))  # a prompt of 700 tokens in two parts, then single ones
def test_an_interruption_around_any_call_loses_nothing(
    call: int, ran: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = endless(), tiny_tokens(1, 700)[0]
    decoder = Decoder(model)
    want = list(greedy(model, PrefixSession(partial(NativeSession, decoder)), ids, 10))
    append, calls = decoder.append, iter(range(100))

    def interrupted(*args: Any, **options: Any) -> Any:
        now = next(calls) == call
        if now and not ran:
            raise KeyboardInterrupt
        found = append(*args, **options)
        if now:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(decoder, "append", interrupted)
    sessions: list[NativeSession] = []

    def start() -> NativeSession:
        sessions.append(NativeSession(decoder))
        return sessions[-1]

    session, written = PrefixSession(start), []
    with pytest.raises(KeyboardInterrupt):
        list(map(written.append, greedy(model, session, ids, 10)))
    assert written == want[: max(0, call - 1)]
    assert sessions[0].length == (0 if call < 2 else 700 + call - 2)
    on = torch.tensor([*ids, *written])
    assert written + list(greedy(model, session, on, 10 - len(written))) == want


def test_an_exception_where_tokens_are_shown_ends_nothing_else() -> None:
    model, ids = endless(), tiny_tokens(1, 20)[0]
    session = PrefixSession(partial(NativeSession, Decoder(model)))
    want = list(greedy(model, session, ids, 40))
    threads, shown = threads_alive(), []

    def show(token: int) -> None:
        if len(shown) == 25:
            raise RuntimeError("the window is closed")
        shown.append(token)

    with pytest.raises(RuntimeError, match="window"):
        list(map(show, greedy(model, session, ids)))
    assert shown == want[:25]
    assert threads_alive() == threads
    assert list(greedy(model, session, ids, 40)) == want


CHILD = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import torch
from gossamer.engine import Decoder, NativeSession
from tiny import tiny_model, tiny_tokens
torch.set_num_threads(2)
session = NativeSession(Decoder(tiny_model("llama", max_position_embeddings=10**6)))
session.prompt(tiny_tokens(1, 20)[0])
threading.Timer(0.2, print, ["begun"], {"flush": True}).start()
if sys.argv[2] == "prompt":
    session.prompt(tiny_tokens(1, 500_000)[0])
for step in range(10**9):
    session.step(3)
    if step == 100 and sys.argv[2] == "callback":
        raise RuntimeError("the window is closed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prompt", "decode", "callback"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_thread_keeps_an_ended_process_alive(phase: str, number: signal.Signals) -> None:
    if phase == "callback" and number == signal.SIGKILL:
        pytest.skip("it ends by itself")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(TESTS), phase],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        if phase != "callback":
            assert child.stdout.readline() == b"begun\n"
            child.send_signal(number)
        _, told = child.communicate(timeout=WAIT)
    finally:
        child.kill()
    if phase == "callback":
        assert child.returncode == 1
        assert b"the window is closed" in told
    else:
        # where a library runs code as the interpreter ends, Python forgets that it was interrupted: code 1
        interrupted = number == signal.SIGINT and told.endswith(b"KeyboardInterrupt\n")
        assert child.returncode == -number or (interrupted and child.returncode == 1), told


# ---- memory

GROWTH = """
import sys
sys.path.insert(0, sys.argv[1])
import psutil, torch
from gossamer.engine import Decoder, NativeSession
from tiny import tiny_model
torch.set_num_threads(2)
session = NativeSession(Decoder(tiny_model("llama", max_position_embeddings=20_000, num_hidden_layers=1)))
def now():
    return psutil.Process().memory_info().rss, session.nbytes
token, before = 3, None
for _ in range(11_000):
    token = int(session.step(token).numpy().argmax())
    if session.length == 1_000:
        before = now()
print(*before, *now(), session.length)
"""


@pytest.mark.slow
def test_memory_of_ten_thousand_tokens_is_that_of_the_cache() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(TESTS)], capture_output=True, text=True, timeout=WAIT
    )
    assert done.returncode == 0, done.stderr
    resident, cache, resident_then, cache_then, length = map(int, done.stdout.split())
    assert length == 11_000
    chunk = 256 * 2 * 2 * 16 * 2  # keys and values of two heads of 16 in bfloat16
    assert (cache, cache_then) == (4 * chunk, 43 * chunk)
    # less than one number a token: what allocators take is counted in pages
    assert resident_then - resident < cache_then - cache + 10_000 * 8


# ---- threads and forks


def test_decoders_of_different_sizes_take_turns_in_one_thread() -> None:
    sizes = (
        {},
        {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 12},
        {"num_hidden_layers": 1},
    )
    decoders, ids = [Decoder(tiny_model("llama", **size)) for size in sizes], tiny_tokens(1, 40)[0]
    want = [NativeSession(decoder, torch.float32).logits(ids) for decoder in decoders]
    sessions = [NativeSession(decoder, torch.float32) for decoder in decoders]
    for part in ids.split([30, *[1] * 10]):
        for session, logits in zip(sessions, want, strict=True):
            at = session.length
            assert torch.equal(session.logits(part), logits[at : at + len(part)])


def test_threads_that_share_a_session_take_turns() -> None:
    decoder, ids = Decoder(endless()), torch.full((64,), 5)
    one, other = NativeSession(decoder), NativeSession(decoder)
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        for _ in range(20):
            one.prompt(ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.length == 4 * 20 * 64
    other.prompt(torch.full((one.length,), 5))
    assert torch.equal(one.step(7), other.step(7))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_forked_while_another_thread_decodes() -> None:
    decoder, ids = Decoder(endless()), tiny_tokens(1, 30)[0]
    want, over = NativeSession(decoder).logits(ids), threading.Event()
    session = NativeSession(decoder)

    def work() -> None:
        while not over.is_set():
            session.step(3)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(WAIT)  # ends a child that hangs
                os._exit(0 if torch.equal(NativeSession(decoder).logits(ids), want) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        over.set()
        thread.join()
    assert torch.equal(NativeSession(decoder).logits(ids), want)


@pytest.mark.parametrize("other", [{"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"head_dim": 32}])
def test_a_cache_of_another_model_is_refused(other: dict[str, Any]) -> None:
    decoder, cache = Decoder(tiny_model("llama")), Decoder(tiny_model("llama", **other)).new_cache()
    with pytest.raises(ValueError, match="another model"):
        decoder.append(cache, torch.tensor([3]))


# ---- models that disagree with their configuration

NAN = float("nan")
THETA = {"rope_type": "default", "rope_theta": NAN}
DISAGREEING: dict[str, tuple[dict[str, Any], str]] = {
    "hidden size": (
        {"hidden_size": 128},
        r"embed_tokens.weight has shape \(384, 64\).* asks for \(384, 128\)",
    ),
    "negative size": ({"hidden_size": -64}, "no causal language model of m: .*-64"),
    "size of a wrong kind": ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
    "size past all memory": ({"vocab_size": 10**12}, "no causal language model of m"),
    "layer too many": ({"num_hidden_layers": 4}, "layers.3.* is missing from the weight files"),
    "layer too few": ({"num_hidden_layers": 2}, "holds the tensor model.layers.2.*for which .* has no place"),
    "small vocabulary": ({"vocab_size": 100}, r"embed_tokens.weight has shape .* asks for \(100, 64\)"),
    "large vocabulary": ({"vocab_size": 1000}, r"embed_tokens.weight has shape .* asks for \(1000, 64\)"),
    "heads": ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    "heads of keys": ({"num_key_value_heads": 3}, r"k_proj.weight has shape .* asks for \(48, 64\)"),
    "no heads": ({"num_attention_heads": 0}, "no causal language model of m"),
    "no heads of keys": ({"num_key_value_heads": 0}, "no causal language model of m"),
    "odd heads": ({"head_dim": 15}, "even"),
    "padding past the vocabulary": ({"pad_token_id": 999}, "no causal language model of m"),
    "NaN in norms": ({"rms_norm_eps": NAN}, "config of m is damaged: rms_norm_eps is no number"),
    "NaN in rotations": ({"rope_parameters": THETA}, "config of m is damaged: rope_theta is no number"),
    "NaN in a size": ({"intermediate_size": NAN}, "'intermediate_size' expected int"),
    "norms below zero": ({"rms_norm_eps": -1.0}, "native decoder cannot run .* -1.0"),
    "infinite norms": ({"rms_norm_eps": float("inf")}, "native decoder cannot run .* inf"),
    "no rotation": ({"rope_parameters": {**THETA, "rope_theta": 0.0}}, "rotary frequencies are not finite"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "m", "llama_untied", head_dim=16)


@contextmanager
def configured(folder: Path, changes: dict[str, Any]) -> Iterator[None]:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({**json.loads(config), **changes}))
    try:
        yield
    finally:
        (folder / "config.json").write_text(config)


@pytest.mark.parametrize("case", DISAGREEING)
def test_models_that_disagree_with_their_config_are_refused(case: str, folder: Path) -> None:
    changes, said = DISAGREEING[case]
    with configured(folder, changes), pytest.raises(ModelError, match=said) as refusal:
        load(folder, engine="native")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(keep: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    try:
        with pytest.raises(ModelError, match="weight file is damaged"):
            load(folder, engine="native")
    finally:
        file.write_bytes(whole)


def test_what_was_refused_leaves_no_model_and_hinders_no_other(folder: Path) -> None:
    from transformers import PreTrainedModel

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), PreTrainedModel | Decoder) for thing in gc.get_objects())

    load(folder, engine="native")
    before = alive()
    for changes, _ in DISAGREEING.values():
        with configured(folder, changes), pytest.raises(ModelError):
            load(folder, engine="native")
    assert alive() == before
    ids = tiny_tokens(1, 30)[0]
    want = NativeSession(Decoder(tiny_model("llama_untied", head_dim=16))).logits(ids)
    session: Any = load(folder, engine="native").session()
    assert torch.equal(session.logits(ids), want)


def test_a_window_below_zero_is_refused() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = -4
    assert why_not(model) == "its layers would see -4 positions"


@pytest.mark.parametrize("engine", ["auto", "transformers", "native"])
def test_caches_are_looked_at_in_any_engine(engine: Any, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    with pytest.raises(ModelError, match="unknown cache 'nonsense'"):
        load(folder, engine=engine, cache="nonsense")
    told = [load(folder, engine=engine, cache=cache).engine for cache in ("bfloat16", torch.bfloat16, "int8")]
    assert told[0] == told[1]
    assert told[2].endswith("not in int8") == (engine != "native")
