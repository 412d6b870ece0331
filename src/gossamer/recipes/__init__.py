"""Whole jobs as steps: compress, load and run, measure quality and speed, describe, quickstart."""
