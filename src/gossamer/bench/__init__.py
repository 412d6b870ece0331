"""Speed and memory of models on this machine, rivals side by side."""

from gossamer.bench.machine import Machine, machine_facts, read_bandwidth
from gossamer.bench.memory import MemoryUse, peak_bytes, reset_peak, resident_bytes, resident_memory
from gossamer.bench.speed import Speed, SpeedComparison, compare_speed, decode_bytes, measure_speed

__all__ = [
    "Machine",
    "MemoryUse",
    "Speed",
    "SpeedComparison",
    "compare_speed",
    "decode_bytes",
    "machine_facts",
    "measure_speed",
    "peak_bytes",
    "read_bandwidth",
    "reset_peak",
    "resident_bytes",
    "resident_memory",
]
