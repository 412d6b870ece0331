"""Speed and memory of models on this machine, rivals side by side, and the layouts that are fastest on it."""

from gossamer.bench.machine import Machine, machine_facts, read_bandwidth
from gossamer.bench.memory import peak_bytes, reset_peak, resident_bytes, usable_memory
from gossamer.bench.planning import Plan, PlanRow, plan
from gossamer.bench.profiling import Part, Profile, profile
from gossamer.bench.speed import Speed, SpeedComparison, compare_speed, decode_bytes, measure_speed

__all__ = [
    "Machine",
    "Part",
    "Plan",
    "PlanRow",
    "Profile",
    "Speed",
    "SpeedComparison",
    "compare_speed",
    "decode_bytes",
    "machine_facts",
    "measure_speed",
    "peak_bytes",
    "plan",
    "profile",
    "read_bandwidth",
    "reset_peak",
    "resident_bytes",
    "usable_memory",
]
