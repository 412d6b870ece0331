"""Allocations: one sparsity shared out over layers, and any budget split by what is lost; each published way
in a file of its own.

`knapsack` splits whatever a budget is of.
"""

from gossamer.sparse.allocate.knapsack import least_error, least_error_formats
from gossamer.sparse.allocate.method import ALLOCATIONS, Allocation, LayerInfo, allocation

__all__ = ["ALLOCATIONS", "Allocation", "LayerInfo", "allocation", "least_error", "least_error_formats"]
