"""The streamed gradient pass against autograd over the whole model, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.calibrate import Gradient, SignedGradient, WorkFolder, gather, gradient_file
from gossamer.errors import CalibrationError, ModelError, OutputError, ResumeError
from gossamer.models import find_parts, load_model, prunable, weight_of
from gossamer.models.skeleton import WeightFiles, skeleton
from tiny import tiny_folder, tiny_model, tiny_tokenizer, tiny_tokens

WINDOWS = tiny_tokens(windows=3, seqlen=20)


def run(folder: Path, work: Path, windows: torch.Tensor = WINDOWS, **options: Any) -> WorkFolder:
    place = WorkFolder(work, {"test": 1})
    gather(skeleton(folder), WeightFiles(folder), place, windows, dtype=torch.float32, **options)
    return place


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {f"{b.name}.{n}": m for b in find_parts(model).blocks for n, m in prunable(b).items()}


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        *((arch, Gradient) for arch in ("llama", "gpt2", "gemma2", "qwen3_moe")),
        *((arch, SignedGradient) for arch in ("llama", "gpt2")),
    ],
)
def test_equals_autograd_over_the_whole_model(arch: str, kind: type[Gradient], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", arch)
    work = run(folder, tmp_path / "work", kind=kind)
    model, _ = load_model(folder, torch.float32)
    expected = {n: [torch.zeros(weight_of(m).shape)] * 2 for n, m in layers_of(model).items()}
    outputs: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        output.retain_grad()
        given[name] = output

    for name, layer in layers_of(model).items():
        layer.register_forward_hook(lambda m, args, output, name=name: keep(name, output))
    for ids in WINDOWS:
        model.zero_grad()
        given.clear()
        model(ids[None], labels=ids[None]).loss.backward()
        for name, layer in layers_of(model).items():
            turned = type(layer).__name__ == "Conv1D"
            g = layer.weight.grad.T if turned else layer.weight.grad
            averaged = g if kind is SignedGradient else g.abs()
            expected[name] = [expected[name][0] + averaged / 3, expected[name][1] + g.square() / 3]
            grad = given[name].grad.reshape(-1, g.shape[0])  # type: ignore[union-attr]
            outputs[name] = outputs.get(name, torch.zeros(g.shape[0])) + grad.square().sum(dim=0) / 3
    assert len(expected) >= 12
    for name, (mean, squares) in expected.items():
        found = kind.read(gradient_file(work, name), tuple(mean.shape))  # type: ignore[arg-type]
        torch.testing.assert_close(found.mean, mean, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(found.squares, squares, atol=1e-9, rtol=2e-3)
        torch.testing.assert_close(found.outputs, outputs[name], atol=1e-8, rtol=2e-3)
        assert found.mean.abs().max() > 0


def test_logits_of_long_windows_are_made_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model")
    whole = run(folder, tmp_path / "whole")
    monkeypatch.setattr("gossamer.calibrate.gradients.POSITIONS", 7)
    pieces = run(folder, tmp_path / "pieces")
    name = "model.layers.0.mlp.up_proj"
    a, b = (Gradient.read(gradient_file(w, name), (128, 64)) for w in (whole, pieces))
    torch.testing.assert_close(a.mean, b.mean, atol=1e-7, rtol=1e-4)


class StopError(Exception):
    pass


def test_goes_on_from_every_step_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    whole = run(folder, tmp_path / "whole")
    names = sorted(p.name for p in whole.path.glob("*.gradient"))
    assert len(names) == 21
    for stop in range(7):

        def interrupt(stage: str, done: int, total: int, stop: int = stop) -> None:
            assert total == 7
            if done == stop:
                raise StopError

        work = tmp_path / f"work{stop}"
        with pytest.raises(StopError):
            run(folder, work, progress=interrupt)
        again = run(folder, work)
        for name in names:
            assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()
        assert not list(again.path.glob("*.states"))  # what steps needed is freed
    calls: list[int] = []
    run(folder, tmp_path / "whole", progress=lambda stage, done, total: calls.append(done))
    assert not calls  # finished: nothing is done twice


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise StopError

    with pytest.raises(StopError):
        run(folder, tmp_path / "work", progress=interrupt)
    states = tmp_path / "work" / "hidden1.states"
    states.write_bytes(states.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(ResumeError, match=r"hidden1.*damaged"):
        run(folder, tmp_path / "work")


def test_damaged_gradients_are_refused(tmp_path: Path) -> None:
    work = run(tiny_folder(tmp_path / "model"), tmp_path / "work")
    path = next(work.path.glob("*.q_proj.gradient"))
    assert Gradient.read(path, (64, 64)).reached
    data = path.read_bytes()
    for damaged in (data[:-5], data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], b""):
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match=r"q_proj.gradient is damaged; delete work"):
            Gradient.read(path, (64, 64))
    path.unlink()
    with pytest.raises(OutputError, match="vanished from work; delete that"):
        Gradient.read(path, (64, 64))


def test_what_has_no_gradient_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(CalibrationError, match="2 tokens"):
        run(folder, tmp_path / "a", tiny_tokens(2, 1))
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("inf")
    broken.save_pretrained(tmp_path / "inf")
    tiny_tokenizer().save_pretrained(tmp_path / "inf")
    with pytest.raises(ModelError, match="infinity"):
        run(tmp_path / "inf", tmp_path / "b")


def test_a_layer_that_is_called_twice_has_both_outputs() -> None:
    from gossamer.calibrate.gradients import _Sums

    layer = torch.nn.Linear(4, 3)
    sums = _Sums(layer, SignedGradient)
    first, second = (layer(torch.randn(2, 5, 4)) for _ in range(2))
    for output in (first, second):
        sums.see(layer, (), output)
    loss = (first * 2).sum() + (second * 3).sum()
    weight, *outputs = torch.autograd.grad(loss, [layer.weight, *sums.given])
    sums.add(weight, outputs)
    found = sums.finish("twice", 1)
    torch.testing.assert_close(found.outputs, torch.full((3,), 10.0 * (4 + 9)))
    torch.testing.assert_close(found.mean, weight)
    assert not sums.given
