"""A decoding session as a transformers model: for code that knows only those, such as lm-eval's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from gossamer.errors import ModelError
from gossamer.models.session import PrefixSession, SessionFactory, all_logits

_HARMLESS = {"use_cache", "return_dict", "cache_position"}  # that change nothing of the logits


class SessionModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A transformers model whose logits come from the sessions that ``start`` makes, one for each row.

    ``config`` and ``settings`` (the generation_config), both copied, are those of the model that the sessions
    run. It has no parameters, and no cache is passed around: rows that extend what was run last go on from
    there, so that ``generate`` runs each token once, while a beam search is right but slow. Not for several
    threads at once.
    """

    def __init__(self, config: PreTrainedConfig, start: SessionFactory, settings: Any = None) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # there is no attention here that another could replace,
        config._experts_implementation = "eager"  # nor experts
        super().__init__(config)
        if settings is not None:
            self.generation_config = copy.deepcopy(settings)
        self._start = start
        self._rows: list[PrefixSession] = []

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """float32, that of the logits."""
        return torch.float32

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``generate`` calls the model with: always the whole rows."""
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate`` asks for where several tokens are guessed, and some then taken back."""
        raise ModelError(
            "a model that runs in sessions has no cache that could take tokens back: generate without an "
            "assistant model and without prompt_lookup_num_tokens"
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """``logits``, float32 ``(batch, n, vocab)``, of the last ``logits_to_keep`` positions (0: of all).

        ``input_ids``: int64 ``(batch, n)``; ``attention_mask``, of the same shape: 0 for padding, on either
        side, whose logits are zero. Raises ModelError for arguments that a session has no use for.
        """
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        foreign = sorted(given - _HARMLESS)
        if past_key_values is not None and past_key_values.get_seq_length():
            foreign.append("past_key_values")
        if foreign:
            raise ModelError(f"a model that runs in sessions takes token ids alone, not {', '.join(foreign)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ModelError(
                f"the attention mask has the shape {tuple(mask.shape)}, the tokens {tuple(input_ids.shape)}"
            )
        rows = [ids[kept.bool()] for ids, kept in zip(input_ids, mask, strict=True)]
        if any(len(row) == 0 for row in rows):
            raise ModelError("a row holds no token: the attention mask leaves at least one in each")
        if logits_to_keep == 1 and bool(mask[:, -1].all()):
            return CausalLMOutputWithPast(logits=torch.stack(self._next(rows))[:, None])
        logits = None
        for index, row in enumerate(rows):
            found = all_logits(self._start(), row)
            if logits is None:
                logits = found.new_zeros(*input_ids.shape, found.shape[-1])
            logits[index, mask[index].bool()] = found
        assert logits is not None
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)

    def _next(self, rows: list[Tensor]) -> list[Tensor]:
        """The logits after each row, by the session that already ran most of it where there is one."""
        free, self._rows, found = self._rows, [], []
        for ids in (row.tolist() for row in rows):
            session = max(free, key=lambda one: one.shared(ids), default=None)
            if session is None or not session.shared(ids):
                session = PrefixSession(self._start)
            else:
                free.remove(session)
            self._rows.append(session)
            found.append(session.read(ids).clone())
        return found
