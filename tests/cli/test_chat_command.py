"""`gossamer chat` from a pipe, in a terminal, and stopped by Ctrl-C."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from cli_run import run

from gossamer.recipes.chat import Conversation
from gossamer.recipes.load import load
from tiny import tiny_folder

COMMAND = (sys.executable, "-c", "from gossamer.cli.app import main; main()")
WAIT = 240  # seconds: imports of a busy machine take their time


def test_each_line_of_a_pipe_is_a_turn(model: Path) -> None:
    done = run(
        "chat", model, "--system", "Be kind.", "--max-new-tokens", "8",
        stdin="hello\n\nwhy?\n/reset\nhello\n/exit\nnot asked\n",
    )  # fmt: skip
    assert done.code == 0, done.err
    conversation = Conversation(load(model), system="Be kind.", max_new_tokens=8)
    answers = ["".join(conversation.ask(line)) for line in ("hello", "why?")]
    assert done.out == "".join(f"{answer}\n" for answer in (*answers, answers[0]))
    assert done.err.count("tokens/s]") == 3


def test_the_end_of_input_ends_and_kept_tokens_are_told(model: Path) -> None:
    done = run("chat", model, "--max-new-tokens", "1", stdin="hello\nwhy?")
    assert done.code == 0, done.err
    assert " kept)" not in done.err.splitlines()[0]
    assert " kept)" in done.err.splitlines()[1]


def test_options_reach_the_answers(model: Path) -> None:
    greedy = run("chat", model, "--max-new-tokens", "8", stdin="hello\n").out
    drawn = ("chat", model, "--max-new-tokens", "8", "--temperature", "5")
    assert run(*drawn, stdin="hello\n").out != greedy
    for narrow in (("--top-k", "1"), ("--min-p", "1"), ("--top-p", "1e-9")):
        assert run(*drawn, *narrow, stdin="hello\n").out == greedy
    stop = greedy[2:4]
    assert run("chat", model, "--max-new-tokens", "8", "--stop", stop, stdin="hello\n").out == (
        greedy.partition(stop)[0] + "\n"
    )


def test_a_turn_that_does_not_fit_ends_a_pipe(model: Path) -> None:
    done = run("chat", model, stdin="x y " * 400 + "\n")
    assert done.code == 2
    assert "512 positions" in done.err


def press_until(process: subprocess.Popen[bytes], stopped: threading.Event) -> None:
    """Ctrl-C, and again every five seconds as a person would: Python drops one inside a destructor."""
    process.send_signal(signal.SIGINT)
    while not stopped.wait(5) and process.poll() is None:
        process.send_signal(signal.SIGINT)


def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path: Path) -> None:
    """The first answer would go on for a million tokens; the second is asked of what stood until Ctrl-C."""
    model = tiny_folder(tmp_path / "endless", max_position_embeddings=10**6, eos_token_id=None)
    process = subprocess.Popen(
        [*COMMAND, "chat", str(model), "--max-new-tokens", "1000000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    for turn in range(2):
        process.stdin.write(b"hello\n")
        # a press that came late, when the program waited again, took the line with it: it is asked once more
        if turn and not select.select([process.stdout], [], [], 20)[0]:
            process.stdin.write(b"hello\n")
        assert process.stdout.read(1)  # the answer has begun
        stopped = threading.Event()
        again = threading.Thread(target=press_until, args=(process, stopped))
        again.start()
        while b"prompt tokens" not in (line := process.stderr.readline()):
            assert line, "the program ended"
        stopped.set()
        again.join()
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read():  # the rest of this answer, which was written before that line
            pass
        os.set_blocking(process.stdout.fileno(), True)
    _, told = process.communicate(b"/exit\n", timeout=WAIT)
    assert process.returncode == 0, told


def wait_asleep(process: subprocess.Popen[bytes]) -> None:
    """Until the process waits for input: readline prints its prompt some time before it begins to wait, and a
    signal that comes between the two is not looked at before a key is pressed."""
    seen, until = 0, time.monotonic() + WAIT
    while seen < 10:
        assert time.monotonic() < until, "the program does not come to rest"
        seen = seen + 1 if psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING else 0
        time.sleep(0.03)


def test_in_a_terminal(model: Path) -> None:
    """A prompt, Ctrl-C while it waits, and a turn that does not fit: the conversation goes on."""
    import pty

    main, side = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", str(model), "--max-new-tokens", "3"],
        stdin=side, stdout=side, stderr=side, start_new_session=True,
    )  # fmt: skip
    os.close(side)
    seen = b""

    def until(word: bytes) -> None:
        nonlocal seen
        while word not in seen:
            seen += os.read(main, 4096)
        seen = seen.partition(word)[2]

    until(b"> ")
    wait_asleep(process)
    process.send_signal(signal.SIGINT)
    until(b"/exit")
    until(b"> ")
    for _ in range(2):
        os.write(main, b"hello\n")
        until(b"tokens/s]")
        until(b"> ")
    os.write(main, b"x y " * 300 + b"\n")
    until(b"512 positions")
    until(b"> ")
    os.write(main, b"/exit\n")
    assert process.wait(WAIT) == 0
    os.close(main)
