"""Times llama.cpp's own products (`ggml_mul_mat`) on the layers of the kernel benchmark, all in one graph.

Run it in an environment of its own: `pip install llama-cpp-python numpy` (build flags: benchmarks/README.md).
Random Q4_0 and Q8_0 weights, both as a file holds them and repacked, as llama.cpp repacks them when it loads
a model where the processor has a use for it; the faster one is reported. Each layer rounds its input to Q8_0.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_protocol import (
    DECODE_ROWS,
    Layer,
    Product,
    Reader,
    Task,
    add_arguments,
    blocks_for,
    distinct,
    emit,
    product,
    task_of,
)

F32 = 0
Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
SILENT = Log(lambda level, text, data: None)
TYPES = {"Q8_0": (8, "int8", 34), "Q4_0": (2, "int4", 18)}  # ggml's number, values, bytes of 32 weights


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# name: (result, arguments); every handle of ggml's is a void pointer here.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [Log, c_void_p]),
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buffer_set_usage": (None, [c_void_p, c_int]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_cpu_has_avx512": (c_int, []),
}


class Ggml:
    """The functions of ggml that this needs, from the libraries that llama-cpp-python brings along."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        libraries = [
            ctypes.CDLL(str(next(folder.glob(f"lib{name}.so"))), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu")
        ]
        for name, (result, arguments) in FUNCTIONS.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.version = llama_cpp.__version__

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not declared in FUNCTIONS")

    def context(self, tensors: int, graph: int = 0) -> Any:
        """A context that holds descriptions only; the tensors' memory comes from a buffer type."""
        size = tensors * self.tensor_overhead() + (self.graph_overhead_custom(graph, False) if graph else 0)
        return self.init(InitParams(size + (1 << 16), None, True))

    def buffer_types(self) -> dict[str, Any]:
        """Where weights can lie: as in the file, and every repacked order that this build has."""
        found = {"as in the file": self.backend_cpu_buffer_type()}
        address = self.backend_reg_get_proc_address(
            self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
            types = extra(self.device)
            i = 0
            while types and types[i]:
                found[self.backend_buft_name(types[i]).decode()] = types[i]
                i += 1
        return found

    @property
    def device(self) -> Any:
        return self.backend_reg_dev_get(self.backend_cpu_reg(), 0)


def random_weight(kind: str, layer: Layer, rng: np.random.Generator) -> np.ndarray:
    """Blocks of 32 weights: a float16 scale, then the codes (ggml-common.h, block_q4_0 and block_q8_0)."""
    size = TYPES[kind][2]
    blocks = rng.integers(0, 256, (layer[0] * layer[1] // 32, size), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return blocks


class Walk:
    """All blocks of one model in one graph, with the weights in one buffer type."""

    def __init__(
        self, ggml: Ggml, kind: str, where: Any, layers: tuple[Layer, ...], blocks: int, rows: int
    ) -> None:
        self.ggml, self.buffers, self.contexts = ggml, [], []
        count = blocks * len(layers)
        number = TYPES[kind][0]
        weights = self._context(count)
        self.weights = [
            ggml.new_tensor_2d(weights, number, cols, out) for _ in range(blocks) for out, cols in layers
        ]
        self.works = self._allocate(weights, where)
        if not self.works:
            return
        work = self._context(count + 8, count + 8)
        inputs = {cols: ggml.new_tensor_2d(work, F32, cols, rows) for cols in distinct(layers)}
        self.graph = ggml.new_graph_custom(work, count + 8, False)
        self.outputs = []
        for i, weight in enumerate(self.weights):
            self.outputs.append(ggml.mul_mat(work, weight, inputs[layers[i % len(layers)][1]]))
            ggml.build_forward_expand(self.graph, self.outputs[-1])
        self.works = all(ggml.backend_dev_supports_op(ggml.device, y) for y in self.outputs[: len(layers)])
        if not self.works:  # as llama.cpp asks when it loads: not every type has a repacked order everywhere
            return
        self._allocate(work, ggml.backend_cpu_buffer_type())
        rng = np.random.default_rng(0)
        samples = [random_weight(kind, layer, rng) for layer in layers]
        for i, weight in enumerate(self.weights):
            self._set(weight, samples[i % len(layers)])
        for cols, x in inputs.items():
            self._set(x, rng.standard_normal((rows, cols)).astype(np.float32))

    def _context(self, tensors: int, graph: int = 0) -> Any:
        self.contexts.append(self.ggml.context(tensors, graph))
        return self.contexts[-1]

    def _allocate(self, context: Any, where: Any) -> bool:
        buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(context, where)
        if buffer:
            self.ggml.backend_buffer_set_usage(buffer, 1)  # weights
            self.buffers.append(buffer)
        return bool(buffer)

    def _set(self, tensor: Any, data: np.ndarray) -> None:
        assert self.ggml.nbytes(tensor) == data.nbytes
        self.ggml.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

    def run(self, backend: Any) -> float:
        start = time.perf_counter()
        if self.ggml.backend_graph_compute(backend, self.graph) != 0:
            raise SystemExit("llama.cpp could not compute the graph")
        return time.perf_counter() - start

    def output(self, number: int) -> np.ndarray:
        y = np.empty(self.ggml.nbytes(self.outputs[number]) // 4, np.float32)
        self.ggml.backend_tensor_get(self.outputs[number], y.ctypes.data, 0, y.nbytes)
        return y

    def free(self) -> None:
        for buffer in self.buffers:
            self.ggml.backend_buffer_free(buffer)
        for context in self.contexts:
            self.ggml.free(context)


def best(ggml: Ggml, backend: Any, task: Task, model: str, kind: str, reader: Reader) -> Product:
    """The faster of all orders of the weights, each checked to give the same result."""
    layers = task.models[model]
    _, values, size = TYPES[kind]
    block_bytes = sum(out * cols // 32 * size for out, cols in layers)
    blocks = blocks_for(task.own_bytes, block_bytes)
    found: list[Product] = []
    plain = None
    for name, where in ggml.buffer_types().items():
        walk = Walk(ggml, kind, where, layers, blocks, rows=1)
        if walk.works:
            walk.run(backend)
            first = walk.output(0)
            plain = first if plain is None else plain
            if not np.allclose(first, plain, rtol=1e-3, atol=1e-3 * float(np.abs(plain).max())):
                raise SystemExit(
                    f"llama.cpp's {kind} in {name} differs from the plain one: this harness is wrong"
                )
            times, rates = [], []
            for _ in range(max(5, task.rounds(1) // 2)):
                rates.append(reader.step())
                times.append(walk.run(backend) / blocks)
            found.append(
                product(
                    times,
                    rates,
                    layers,
                    block_bytes,
                    contender=f"llama.cpp {kind}",
                    values=values,
                    model=model,
                    rows=1,
                    own_bytes=blocks * block_bytes,
                    setting=name,
                )
            )
        walk.free()
    fastest = min(found, key=lambda p: p.seconds)
    rest = [f"{p.setting}: {p.seconds * 1e6:.1f} us" for p in found if p is not fastest]
    fastest.setting = "; ".join([fastest.setting, *rest])
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rival_llamacpp_kernels", description=__doc__)
    add_arguments(parser)
    task = task_of(parser.parse_args())
    ggml = Ggml()
    if os.environ.get("GOSSAMER_ISA") == "avx2" and ggml.cpu_has_avx512():
        emit("note", "llama.cpp: skipped, this build uses AVX-512; pass the python of one built without it")
        return
    if task.rows and min(task.rows) > DECODE_ROWS:
        return
    ggml.log_set(SILENT, None)
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, task.threads)
    reader = task.reader()
    emit("version", {"llama-cpp-python": ggml.version})
    for model in task.models:
        for kind, (_, values, _) in TYPES.items():
            if task.values((values,)):
                emit("product", best(ggml, backend, task, model, kind, reader))


if __name__ == "__main__":
    main()
