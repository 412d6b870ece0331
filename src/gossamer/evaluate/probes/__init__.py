"""Probes: what a compressed model may have lost while its perplexity looks well, one probe a file.

After LLM-KICK: Jaiswal et al. 2024, Compressing LLMs: The Truth is Rarely Pure and Never Simple.
"""

from gossamer.claim import Unclaimed
from gossamer.evaluate.probes.probe import PROBES, Change, Probe, ProbeScore, Subject, changed

__all__ = ["PROBES", "Change", "Probe", "ProbeScore", "Subject", "changed"]

UNCLAIMED = Unclaimed(
    name="probes",
    cite="Jaiswal et al. 2024, Compressing LLMs: The Truth is Rarely Pure and Never Simple (LLM-KICK); "
    "Mihaylov et al. 2018, OpenBookQA",
    figures="What perplexity hides",
    why="They are measures, of which nothing is claimed.",
)
