"""Runs our native decoder or transformers for the decode benchmark: a process (see `decode_protocol`).

Ours loads a checkpoint (memory-mapped); its cache is in bfloat16. A variant of transformers is a dtype; its
attention is `sdpa`.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decode_files import checkpoint
from benchmarks.decode_protocol import Job, Ready, Run, main, prompt_ids, stepped

TIMED = 20  # tokens whose parts are timed


def all_bytes(model: nn.Module) -> int:
    """Bytes of all weights, those that are shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


class Native:
    """Our decoder over a checkpoint."""

    def __init__(self, job: Job) -> None:
        from gossamer.engine import Decoder
        from gossamer.models.checkpoint import load_checkpoint

        torch.set_num_threads(job.threads)
        model = load_checkpoint(checkpoint(job), huge_pages=job.huge_pages)
        self.decoder = Decoder(model)
        self.ready = Ready(all_bytes(model), versions(), setting="huge pages" if job.huge_pages else "mapped")
        self.ready.parts = self._parts(min(512, job.context - TIMED))

    def _parts(self, prompt: int) -> dict[str, float]:
        """Median seconds of each part of a token after a prompt."""
        cache = self.decoder.new_cache()
        self.decoder.append(cache, torch.tensor(prompt_ids(prompt, self.decoder.vocabulary)))
        found = [self.decoder.append(cache, torch.tensor([16]), timed=True)[1] for _ in range(TIMED)]
        return {part: statistics.median(one[part] for one in found) for part in found[0]}

    def run(self, ids: list[int], steps: int) -> Run:
        from gossamer.engine import NativeSession

        self.session = NativeSession(self.decoder)
        return stepped(self, ids, steps)

    def logits(self, ids: list[int]) -> Any:
        from gossamer.engine import NativeSession

        return NativeSession(self.decoder).logits(torch.tensor(ids)).numpy()

    def prompt(self, ids: list[int]) -> int:
        return _likeliest(self.session.prompt(torch.tensor(ids)))

    def step(self, token: int) -> int:
        return _likeliest(self.session.step(token))


class Transformers:
    """The dense model as transformers runs it."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job.threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.variant), attn_implementation="sdpa"
        ).eval()
        self.ready = Ready(all_bytes(self.model), versions(), setting="sdpa")

    @torch.inference_mode()
    def run(self, ids: list[int], steps: int) -> Run:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return stepped(self, ids, steps)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Any:
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    def prompt(self, ids: list[int]) -> int:
        found = self.model(
            input_ids=torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return _likeliest(found.logits[0, -1].float())

    def step(self, token: int) -> int:
        return self.prompt([token])


def _likeliest(logits: Tensor) -> int:
    return int(logits.numpy().argmax())  # PyTorch would start threads for it


def load(job: Job) -> Native | Transformers:
    return Native(job) if job.engine == "gossamer" else Transformers(job)


def make(job: Job) -> None:
    if job.engine == "gossamer":
        checkpoint(job)


if __name__ == "__main__":
    main(load, make, sys.argv[1:])
