"""Sparse attention: policies that choose which blocks of keys are looked at, one file each."""

from gossamer.dynamic.attention.files import load_policy, policy_of, save_policy
from gossamer.dynamic.attention.plug import Attend, attach, attention, register_all
from gossamer.dynamic.attention.policy import POLICIES, Policy

__all__ = ["POLICIES", "Attend", "Policy", "attach", "attention", "load_policy", "policy_of", "save_policy"]

register_all()
