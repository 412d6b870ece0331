"""Times OpenVINO's products with compressed weights on the layers of the kernel benchmark, all in one graph.

Run it in an environment of its own: `pip install openvino numpy`. Decoding: int8 (a scale and a zero point an
output, as its own compression tool makes) and int4 (symmetric, a float16 scale for 64 inputs); prompts: dense
weights, in bfloat16 where the processor has it. Settings are tried on some layers, the fastest is kept.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from benchmarks.kernel_protocol import (
    DECODE_ROWS,
    GROUP,
    Layer,
    Product,
    Reader,
    Task,
    add_arguments,
    blocks_for,
    distinct,
    emit,
    last_level_cache,
    product,
    task_of,
)

TRIAL = 8  # times the last-level cache: own bytes while settings are tried
SETTINGS: tuple[dict[str, str], ...] = tuple(
    {**hint, **group}
    for hint in ({}, {"INFERENCE_PRECISION_HINT": "f32"})
    for group in ({}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"})
)

RNG = np.random.default_rng(0)


def bytes_of(values: str, layer: Layer, wide: bool) -> int:
    out, cols = layer
    if values == "int4":
        return out * cols // 2 + out * cols // GROUP * 2
    if values == "int8":
        return out * cols + out * 3
    return out * cols * (4 if wide else 2)


def weight(values: str, layer: Layer) -> Any:
    """A constant that decompresses to (outputs, inputs), as compressed models hold it."""
    out, cols = layer
    if values == "bfloat16":
        halves = RNG.integers(0, 1 << 16, layer, dtype=np.uint16) & 0xBFFF  # between -2 and 2
        return op.constant(halves.view(np.float16)).output(0)
    if values == "int4":
        # memory of its own: a Tensor over an array does not keep the array
        codes = ov.Tensor(ov.Type.i4, ov.Shape([out, cols // GROUP, GROUP]))
        codes.data[:] = RNG.integers(-128, 128, out * cols // 2, dtype=np.int8)
        scales = op.constant(np.full((out, cols // GROUP, 1), 0.01, np.float16))
        scaled = op.multiply(op.convert(op.constant(codes), "f16"), scales)
        return op.reshape(scaled, op.constant(np.array(layer, np.int64)), False).output(0)
    codes = op.constant(RNG.integers(0, 256, layer, dtype=np.uint8))
    zero = op.convert(op.constant(np.full((out, 1), 128, np.uint8)), "f16")
    scales = op.constant(np.full((out, 1), 0.01, np.float16))
    return op.multiply(op.subtract(op.convert(codes, "f16"), zero), scales).output(0)


def model_of(values: str, layers: tuple[Layer, ...], blocks: int, rows: int) -> ov.Model:
    """Every layer on an input of its width; each has weights of its own and a result of its own."""
    inputs = {cols: op.parameter([1, rows, cols], ov.Type.f32) for cols in distinct(layers)}
    results = []
    for _ in range(blocks):
        for layer in layers:
            dense = op.convert(weight(values, layer), "f32")
            results.append(op.result(op.matmul(inputs[layer[1]], dense, False, True)))
    return ov.Model(results, list(inputs.values()), "layers")


def run(
    core: ov.Core,
    task: Task,
    model: str,
    values: str,
    rows: int,
    own: int,
    setting: dict[str, str],
    rounds: int,
    reader: Reader,
) -> Product:
    layers = task.models[model]
    wide = "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    block_bytes = sum(bytes_of(values, layer, wide) for layer in layers)
    blocks = blocks_for(own, block_bytes)
    config = {"INFERENCE_NUM_THREADS": str(task.threads), "PERFORMANCE_HINT": "LATENCY", **setting}
    compiled = core.compile_model(model_of(values, layers, blocks, rows), "CPU", config)
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        x = RNG.standard_normal(list(port.shape), dtype=np.float32)
        request.set_tensor(port, ov.Tensor(x.copy()))
    times, rates = [], []
    for _ in range(rounds + 1):  # the first one packs the weights
        rates.append(reader.step())
        start = time.perf_counter()
        request.start_async()  # infer() would copy every result into Python
        request.wait()
        times.append((time.perf_counter() - start) / blocks)
    name = {"bfloat16": "float32" if wide else "bfloat16"}.get(values, values)
    words = [f"{key}={value}" for key, value in setting.items()] or ["as it is"]
    return product(
        times[1:],
        rates[1:],
        layers,
        block_bytes,
        contender=f"OpenVINO {name}",
        values=values,
        model=model,
        rows=rows,
        own_bytes=blocks * block_bytes,
        setting=", ".join([*words, implementation(compiled)]),
    )


def implementation(compiled: ov.CompiledModel) -> str:
    """What OpenVINO says that its fully connected layers run on."""
    found = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) in ("FullyConnected", "MatMul"):
            found.add(facts["primitiveType"].astype(str))
    return " ".join(sorted(found))


def measure(core: ov.Core, task: Task, model: str, values: str, rows: int, reader: Reader) -> Product:
    """The fastest setting, tried on few layers, then measured on all."""
    if rows > DECODE_ROWS:
        return run(core, task, model, values, rows, task.own_bytes, {}, min(3, task.rounds(rows)), reader)
    trial = min(task.own_bytes, TRIAL * last_level_cache())
    tried = [run(core, task, model, values, rows, trial, s, 5, reader).seconds for s in SETTINGS]
    setting = SETTINGS[int(np.argmin(tried))]
    rounds = max(5, task.rounds(rows) // 2)
    return run(core, task, model, values, rows, task.own_bytes, setting, rounds, reader)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rival_openvino", description=__doc__)
    add_arguments(parser)
    task = task_of(parser.parse_args())
    core = ov.Core()
    reader = task.reader()
    emit("version", {"openvino": ov.__version__})
    for model in task.models:
        for rows in task.rows:
            for values in task.values(("bfloat16",) if rows > DECODE_ROWS else ("int8", "int4")):
                emit("product", measure(core, task, model, values, rows, reader))


if __name__ == "__main__":
    main()
