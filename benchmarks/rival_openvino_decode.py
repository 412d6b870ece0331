"""Runs OpenVINO GenAI on a whole model for the decode benchmark: a contender's process (`decode_protocol`).

Run in an environment with `openvino-genai`, and `optimum-intel[openvino]` to export. Weights: `int4`
(symmetric, groups of 64, embedding and head int8), `int4 all` (those int4 too), `int8`, `bf16` (float16 in
the file, bfloat16 where the processor has it). Setting "f32": the hint that keeps activations in float32.
Of GenAI's two attention backends the one that decodes faster is kept.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.decode_protocol import Job, Ready, Run, main, prompt_ids

INT4 = ("--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0")
EXPORTS: dict[str, tuple[str, ...]] = {
    "int4": INT4,
    "int4 all": (*INT4, "--all-layers"),
    "int8": ("--weight-format", "int8"),
    "bf16": ("--weight-format", "fp16"),
}
BACKENDS = ("PA", "SDPA")


def made(job: Job) -> Path:
    return job.file("openvino-")


def make(job: Job) -> None:
    """The variant's folder, exported by optimum-intel."""
    out = made(job)
    if (out / "openvino_model.xml").exists() and (out / "openvino_tokenizer.xml").exists():
        return
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", job.model, "--task", "text-generation-with-past", *EXPORTS[job.variant], str(out)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


class OpenVino:
    """A pipeline, and how it is asked."""

    def __init__(self, job: Job) -> None:
        self.config: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
        if job.setting == "f32":
            self.config["INFERENCE_PRECISION_HINT"] = "f32"
        self.folder = str(made(job))
        self.plain: Any = None
        trial = prompt_ids(64, 40000)
        seconds = {}
        for backend in BACKENDS:
            self._load(backend)
            self.run(trial, 8)
            seconds[backend] = statistics.median(self.run(trial, 32).step_seconds)
        best = min(BACKENDS, key=seconds.__getitem__)
        if best != BACKENDS[-1]:
            self._load(best)
        tried = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms a token" for name in BACKENDS)
        self.ready = Ready(
            (made(job) / "openvino_model.bin").stat().st_size,
            {"openvino": ov.__version__, "openvino-genai": genai.__version__},
            setting=f"{self.config}, attention {best} ({tried})",
        )

    def _load(self, backend: str) -> None:
        self.pipeline: Any = None  # frees the one before
        options = {**self.config, "ATTENTION_BACKEND": backend}
        if backend == "PA":
            options["scheduler_config"] = genai.SchedulerConfig()
            options["scheduler_config"].enable_prefix_caching = False  # every prompt is read
        self.pipeline = genai.LLMPipeline(self.folder, "CPU", **options)

    def logits(self, ids: list[int]) -> Any:
        if self.plain is None:  # GenAI gives the last token's alone
            config = {name: value for name, value in self.config.items() if name != "ATTENTION_BACKEND"}
            path = Path(self.folder) / "openvino_model.xml"
            self.plain = ov.Core().compile_model(path, "CPU", config).create_infer_request()
        self.plain.reset_state()
        tokens = np.array([ids], np.int64)
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return self.plain.infer(given)["logits"][0]

    def run(self, ids: list[int], steps: int) -> Run:
        asked = genai.GenerationConfig()
        asked.max_new_tokens = asked.min_new_tokens = steps + 1
        asked.ignore_eos = True
        asked.do_sample = False
        found = self.pipeline.generate(ov.Tensor(np.array([ids], np.int64)), asked)
        raw = found.perf_metrics.raw_metrics
        first = float(raw.m_times_to_first_token[0]) / 1e6
        # microseconds; one duration for each token after the first
        rest = [float(t) / 1e6 for t in raw.m_durations][-steps:]
        return Run(first, rest, [int(token) for token in found.tokens[0]])


if __name__ == "__main__":
    main(OpenVino, make, sys.argv[1:])
