"""Measured reports: claims of papers run in miniature, and the catalogue of methods made from them."""

from gossamer.report.reproduce import Texts, Verdict, claimed, reproduce, verdicts_in

__all__ = ["Texts", "Verdict", "claimed", "reproduce", "verdicts_in"]
