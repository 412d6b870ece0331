"""Attention policies in the native decoder: beside the same policy in transformers, and what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gossamer import kernels
from gossamer.dynamic.attention import POLICIES, Policy, attention, load_policy, policy_of, save_policy
from gossamer.dynamic.attention.block_topk import BlockTopK
from gossamer.dynamic.attention.hip import HiP
from gossamer.dynamic.attention.minference import MInference, VerticalSlash
from gossamer.dynamic.attention.sink_window import SinkWindow
from gossamer.dynamic.attention.strided import Strided
from gossamer.engine import Decoder, Look, NativeSession
from gossamer.engine.caches import CACHES, CacheKind
from gossamer.errors import CheckpointError, MethodError, ModelError
from gossamer.kernels import BLOCK
from gossamer.kernels.native import native
from gossamer.recipes.load import load
from tiny import tiny_folder, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

ROWS = 512  # of a prompt that are estimated for together
STATIC: dict[str, Policy] = {
    "sink_window": SinkWindow(4, 100),
    "strided": Strided(window=64, stride=4, dense_layers=1),
}
ESTIMATING: dict[str, Policy] = {
    "block_topk": BlockTopK(3),
    "hip": HiP(2, 64),
    "vertical_slash": MInference(other=VerticalSlash(2, 2)),
    "mixture": MInference(
        {(0, 0): BlockTopK(3), (0, 1): SinkWindow(64, 128), (1, 2): HiP(2, 64)}, VerticalSlash(1, 2)
    ),
}
ALL = STATIC | ESTIMATING
FULL: dict[str, Policy] = {
    "sink_window": SinkWindow(window=4096),
    "strided": Strided(stride=1),
    "block_topk": BlockTopK(99),
    "hip": HiP(count=99),
    "minference": MInference(other=VerticalSlash(99, 99)),
}


def made(arch: str = "llama", **changes: Any) -> Any:
    """Attention that differs from token to token: weights are larger than in other tests."""
    return tiny_model(arch, max_position_embeddings=2048, initializer_range=0.3, **changes)


def session_of(
    model: Any, policy: Policy | None, cache: CacheKind = torch.float32, decoder: Decoder | None = None
) -> NativeSession:
    config = model.config
    looks = policy and policy.native(config.num_hidden_layers, config.num_attention_heads)
    return NativeSession(decoder or Decoder(model), cache, looks)


def in_transformers(model: Any, ids: Tensor, policy: Policy, steps: int) -> tuple[Tensor, float]:
    """Logits of every token, in the native decoder's chunks and then one by one; the share looked at."""
    parts = [*ids[: len(ids) - steps].split(ROWS), *ids[len(ids) - steps :, None]]
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), attention(model, policy) as attend:
        found = [model(part[None], past_key_values=cache).logits[0] for part in parts]
    return torch.cat(found), attend.looked


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_the_policy_in_transformers(name: str) -> None:
    model, ids = made(), tiny_tokens(1, 1100)[0]
    want, looked = in_transformers(model, ids, ALL[name], 4)
    session = session_of(model, ALL[name])
    got = torch.cat([session.logits(ids[:-4]), *(session.step(int(token))[None] for token in ids[-4:])])
    size = float(want.abs().max())
    assert float((got - want).abs().max()) <= 1e-4 * size
    assert float((got - session_of(model, None).logits(ids)).abs().max()) > 0.1 * size
    if name not in ("vertical_slash", "mixture"):  # whose steps transformers does not count
        assert session.looked == looked < 0.5


def test_blocks_that_steps_filled_are_known_to_the_chunk_of_a_prompt_after_them() -> None:
    """Steps that look at everything make no means; the chunk that follows must not take them for made."""
    model, ids = made(), tiny_tokens(1, 700)[0]
    policy = MInference(other=BlockTopK(3))  # acts on prompts alone
    stepped, prompted = session_of(model, policy), session_of(model, policy)
    stepped.prompt(ids[:120])
    for token in ids[120:330]:
        stepped.step(int(token))
    prompted.prompt(ids[:120])
    prompted.decoder.append(prompted._cache, ids[120:330])  # dense, as steps are
    got, want = stepped.prompt(ids[330:]), prompted.prompt(ids[330:])
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avxvnni", "avx512vnni", "avx512", "amx"])
def test_every_instruction_set_chooses_alike(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = native().tier(isa)
    if index < 0:
        pytest.skip(f"this machine does not run {isa}")
    model, ids = made(head_dim=24), tiny_tokens(1, 700)[0]  # 24 lies in 32
    for policy in (ESTIMATING["mixture"], BlockTopK(2)):
        want, _ = in_transformers(model, ids, policy, 2)
        with monkeypatch.context() as patch:
            patch.setattr(kernels.native, "tier", lambda name: index)
            session = session_of(model, policy)
            got = torch.cat([session.logits(ids[:-2]), session.logits(ids[-2:-1]), session.logits(ids[-1:])])
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["sink_window", "strided", "block_topk", "mixture"])
def test_windows_of_layers_and_policies_go_together(arch: str, name: str) -> None:
    changes = {} if arch == "qwen3" else {"sliding_window": 150}
    model, ids = made(arch, **changes), tiny_tokens(1, ROWS)[0]
    with torch.no_grad(), attention(model, ALL[name]):
        want = model(ids[None], use_cache=False).logits[0]
    got = session_of(model, ALL[name]).logits(ids)
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    if name in STATIC:
        session = session_of(model, ALL[name])
        session.prompt(ids[:-3])
        assert torch.equal(torch.stack([session.step(int(token)) for token in ids[-3:]]), got[-3:])


@pytest.mark.parametrize("arch", ["mistral", "qwen2"])
@pytest.mark.parametrize("window", [40, 150])
@pytest.mark.parametrize("policy", [SinkWindow(4, 30), SinkWindow(64, 65), Strided(64, 3), Strided(8, 2, 1)])
def test_caches_that_forget_leave_static_policies_as_they_are(arch: str, window: int, policy: Policy) -> None:
    """Blocks are numbered from the text's first token, not from the first key that a cache still has."""
    model, ids = made(arch, sliding_window=window), tiny_tokens(1, 500)[0]
    session, cache = session_of(model, policy), DynamicCache(config=model.config)
    with torch.no_grad(), attention(model, policy):
        for part in ids.split([1, 99, 130, 1, 1, 64, 200, 1, 1, 1, 1]):
            want = model(part[None], past_key_values=cache).logits[0]
            got = session.logits(part)
            assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("policy", [*ESTIMATING.values()])
def test_what_was_forgotten_cannot_be_rated_and_the_window_is_dense(policy: Policy) -> None:
    model, ids = made("mistral", sliding_window=60), tiny_tokens(1, 300)[0]
    session, cache = session_of(model, None), DynamicCache(config=model.config)
    with torch.no_grad(), attention(model, policy):
        for part in ids.split([64, 1, 170, 1, 1, 63]):
            want = model(part[None], past_key_values=cache).logits[0]
            got = session.logits(part)
            assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
@pytest.mark.parametrize("name", FULL)
def test_a_full_budget_is_dense_attention_bit_for_bit(name: str, cache: CacheKind) -> None:
    model, ids = made(), tiny_tokens(1, 600)[0]
    decoder = Decoder(model)
    session, dense = (session_of(model, policy, cache, decoder) for policy in (FULL[name], None))
    assert torch.equal(session.logits(ids[:595]), dense.logits(ids[:595]))
    for token in ids[595:]:
        assert torch.equal(session.step(int(token)), dense.step(int(token)))
    assert session.looked == 1.0


@pytest.mark.usefixtures("without_tiles")
@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
@pytest.mark.parametrize("name", STATIC)
def test_static_policies_give_a_token_the_same_bits_however_it_comes(name: str, cache: CacheKind) -> None:
    model, ids = made(), tiny_tokens(1, 700)[0]
    decoder = Decoder(model)
    want = session_of(model, STATIC[name], cache, decoder).logits(ids)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = session_of(model, STATIC[name], cache, decoder)
            sizes = [1, 3, 60, 9, 300, 1, 1, 1, 324]
            assert torch.equal(torch.cat([parts.logits(some) for some in ids.split(sizes)]), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("without_tiles")
@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
@pytest.mark.parametrize("name", ESTIMATING)
def test_estimates_depend_on_nothing_but_the_chunk_and_what_came_before(name: str, cache: CacheKind) -> None:
    model, ids = made(), tiny_tokens(1, 1200)[0]
    decoder = Decoder(model)
    want = session_of(model, ESTIMATING[name], cache, decoder).logits(ids)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = session_of(model, ESTIMATING[name], cache, decoder)
            got = [parts.logits(ids[:512]), parts.logits(ids[512:1024])]
            parts.logits(tiny_tokens(1, 64, seed=3)[0])  # forgotten again, with what was known of its keys
            parts.truncate(1024)
            assert torch.equal(torch.cat([*got, parts.logits(ids[1024:])]), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ALL)
def test_later_tokens_never_change_what_came_before(name: str) -> None:
    model, ids = made(), tiny_tokens(1, 640)[0]
    decoder = Decoder(model)
    want = session_of(model, ALL[name], decoder=decoder).logits(ids)
    for at in (1, 100, 511, 639):
        changed = ids.clone()
        changed[at:] = (changed[at:] + 17) % 300
        got = session_of(model, ALL[name], decoder=decoder).logits(changed)
        # to the token; to the block, whose queries are one mean; to the chunk, of which the last are asked
        unit = 1 if name in STATIC else BLOCK if name in ("block_topk", "hip") else ROWS
        assert torch.equal(got[: at // unit * unit], want[: at // unit * unit])
        assert not torch.equal(got[at:], want[at:])


@pytest.mark.parametrize("name", ALL)
def test_one_token_and_what_fits_into_a_block_are_dense(name: str) -> None:
    model, ids = made(), tiny_tokens(1, 64)[0]
    decoder = Decoder(model)
    for length in (1, 2, 64):
        sessions = (session_of(model, policy, decoder=decoder) for policy in (ALL[name], None))
        got, want = (session.logits(ids[:length]) for session in sessions)
        assert torch.equal(got, want)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", ["sink_window", "block_topk", "mixture"])
def test_heads_share_keys_in_any_number(name: str, kv_heads: int) -> None:
    model, ids = made(num_key_value_heads=kv_heads), tiny_tokens(1, 400)[0]
    want, _ = in_transformers(model, ids, ALL[name], 2)
    session = session_of(model, ALL[name])
    got = torch.cat([session.logits(ids[:-2]), *(session.step(int(token))[None] for token in ids[-2:])])
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_a_policy_that_comes_late_knows_the_keys_that_are_there() -> None:
    model, ids = made(), tiny_tokens(1, 500)[0]
    decoder = Decoder(model)
    cache, other = decoder.new_cache(torch.float32), decoder.new_cache(torch.float32)
    policy, late = (decoder.new_policy(BlockTopK(3).native(3, 4)) for _ in range(2))
    for one in (cache, other):
        decoder.append(one, ids[:200])
    decoder.append(cache, ids[200:400], policy=policy)
    decoder.append(other, ids[200:400], policy=policy)
    want = decoder.append(cache, ids[400:], policy=policy)[0]
    assert torch.equal(decoder.append(other, ids[400:], policy=late)[0], want)


def test_what_is_no_policy_of_the_model_is_refused() -> None:
    decoder = Decoder(made())
    for looks, said in (
        ([[Look()] * 4] * 2, "3 layers with 4 heads"),
        ([[Look()] * 3] * 3, "3 layers with 4 heads"),
        ([[Look("nothing")] * 4] * 3, "unknown kind"),
        ([[Look("pooled")] * 4] * 3, "count of head 0 of layer 0 is below 1"),
        ([[Look("static", sink=-1)] * 4] * 3, "out of range"),
    ):
        with pytest.raises(ModelError, match=said):
            NativeSession(decoder, looks=looks)

    class Other(Policy):
        name = "other"

        def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor | None:
            return None

    with pytest.raises(MethodError, match="no form of the attention policy other"):
        Other().native(3, 4)
    other = Decoder(tiny_model("llama", num_hidden_layers=2))
    with pytest.raises(ValueError, match="policy of another model"):
        other.append(other.new_cache(), tiny_tokens(1, 3)[0], policy=decoder.new_policy([[Look()] * 4] * 3))


@pytest.mark.parametrize("policy", [*ALL.values(), VerticalSlash(3, 4)])
def test_policies_are_files(policy: Policy, tmp_path: Path) -> None:
    assert save_policy(policy, tmp_path) == tmp_path / "attention.json"
    assert load_policy(tmp_path) == policy == policy_of(tmp_path / "attention.json")


def test_damaged_files_and_unknown_names_are_refused(tmp_path: Path) -> None:
    assert policy_of("hip") == HiP()
    with pytest.raises(MethodError, match="unknown attention policy 'hop'; did you mean 'hip'"):
        policy_of("hop")
    file = tmp_path / "some.json"
    heads = {"policy": "minference", "other": {"policy": "hip"}, "patterns": [{"policy": "hip"}]}
    wrong: list[dict[str, Any]] = [
        {"policy": "hip", "count": 1.5},
        {"policy": "hip", "count": True},
        {"policy": "hip", "window": "64"},
        {"policy": "block_topk", "count": 3.5},
        {"policy": "sink_window", "sink": 4.5},
        {"policy": "sink_window", "window": -1},
        {"policy": "strided", "dense_layers": -1},
        {"policy": "vertical_slash", "vertical": -1},
        {"policy": "vertical_slash", "slash": None},
        {"policy": "label_blocks", "labels": [[[1.5, 2]]]},
        {"policy": "label_blocks", "labels": [[[1, 2]]], "count": -1},
        {**heads, "heads": [[0, 0, 1]]},
        {**heads, "heads": [[0, 0, -1]]},
        {**heads, "heads": [[0, True, 0]]},
        {**heads, "heads": [[0, 0]]},
        {**heads, "patterns": [{"policy": "hip", "count": 0}], "heads": []},
    ]
    contents = ["{", "{}", '{"policy": "nothing"}', '{"policy": "hip", "depth": 1}', "[1]"]
    for content in [*contents, *map(json.dumps, wrong)]:
        file.write_text(content)
        with pytest.raises(CheckpointError, match=r"some\.json is no attention policy"):
            load_policy(file)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_policy(tmp_path / "nowhere.json")


def test_a_loaded_model_attends_by_a_policy_in_either_engine(tmp_path: Path) -> None:
    folder, ids = tiny_folder(tmp_path / "tiny", initializer_range=0.3), tiny_tokens(1, 500)[0]
    file = save_policy(BlockTopK(2), tmp_path / "policy.json")
    dense = load(folder, dtype="float32").session().prompt(ids)
    ours, theirs = (
        load(folder, dtype="float32", engine=engine, cache="float32", attention=file).session().prompt(ids)
        for engine in ("native", "transformers")
    )
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    assert float((ours - dense).abs().max()) > 1e-2 * float(theirs.abs().max())
    assert set(POLICIES) >= {"sink_window", "strided", "block_topk", "hip", "minference"}
