"""Sparsity at run time: activations and attention that skip work, measured beside the dense rivals."""
