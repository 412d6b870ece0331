"""Sparsity that depends on the input, chosen at run time on a finished model."""
