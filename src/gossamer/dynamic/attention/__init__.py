"""Sparse attention: policies that choose which blocks of keys are looked at, one file each."""

from gossamer.dynamic.attention.plug import Attend, attention, register_all
from gossamer.dynamic.attention.policy import POLICIES, Policy

__all__ = ["POLICIES", "Attend", "Policy", "attention"]

register_all()
