"""Runs llama.cpp on a whole model for the decode benchmark: a contender's process (see `decode_protocol`).

Run in an environment with `llama-cpp-python` alone. llama.cpp's own calls by way of its Python bindings,
without the copies that their `Llama` class makes of logits; the package carries no bench tool that could be
faster. Cache in float16, flash attention as llama.cpp chooses ("no flash": without).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.decode_protocol import Job, Ready, Run, main, stepped

BATCH = 512
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


def source(job: Job) -> Path:
    """The file in float32 that `decode_files` makes; one with random weights is in its type already."""
    return Path(job.folder) / "source.gguf"


def quantized(job: Job) -> Path:
    return job.file("", ".gguf")


def make(job: Job) -> None:
    """The variant's file, made of the float32 one by llama.cpp itself."""
    from benchmarks.llamacpp_files import quantize

    quantize(source(job), quantized(job), job.variant, job.threads)


class LlamaCpp:
    """One model and one context."""

    def __init__(self, job: Job) -> None:
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        built = llama_cpp.llama_print_system_info().decode()
        if os.environ.get("GOSSAMER_ISA") == "avx2" and "AVX512 = 1" in built:
            raise SystemExit("this build of llama.cpp uses AVX-512; pass the python of one built without it")
        path = str(quantized(job)).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {quantized(job).name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-job.context // 256) * 256
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = job.threads
        params.no_perf = True
        if job.setting == "no flash":
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.ready = Ready(
            llama_cpp.llama_model_size(self.model),
            {"llama-cpp-python": llama_cpp.__version__},
            setting=job.setting or "flash attention: auto",
        )

    def run(self, ids: list[int], steps: int) -> Run:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        return stepped(self, ids, steps)

    def logits(self, ids: list[int]) -> Any:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        found = np.empty((len(ids), self.vocabulary), np.float32)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            code = llama_cpp.llama_decode(self.context, batch)
            if code != 0:
                raise SystemExit(f"llama.cpp could not run {len(part)} tokens (code {code})")
            rows: Any = llama_cpp.llama_get_logits(self.context)
            found[start : start + len(part)] = np.ctypeslib.as_array(rows, (len(part), self.vocabulary))
            llama_cpp.llama_batch_free(batch)
        return found

    def prompt(self, ids: list[int]) -> int:
        for start in range(0, len(ids), BATCH):
            self._decode(ids[start : start + BATCH])
        return self._likeliest()

    def step(self, token: int) -> int:
        self._decode([token])
        return self._likeliest()

    def _decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise SystemExit(f"llama.cpp could not run {len(ids)} tokens (code {code})")

    def _likeliest(self) -> int:
        logits: Any = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


if __name__ == "__main__":
    main(LlamaCpp, make, sys.argv[1:])
