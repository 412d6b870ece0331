"""Activation sparsity: which inputs of linear layers are dropped at run time, chosen on a finished model.

    calibrated = calibrate(model, method("teal"), windows)
    gates = calibrated.gates(0.4)            # or by layer: greedy(model, calibrated, 0.4, windows)
    gates = settle(model, gates, windows)    # to the share asked for, below each other
    with gates.attach(model) as attached:
        ...                                  # runs sparse; attached.achieved() says how sparse
    gates.save(folder)                       # beside a checkpoint

Nothing here is fast by itself: the layout `columns` reads the weights of active inputs alone.
"""

from gossamer.dynamic.activations.allocate import greedy, greedy_levels
from gossamer.dynamic.activations.calibrate import Calibrated, calibrate, settle
from gossamer.dynamic.activations.gates import AttachedGates, Gate, Gates
from gossamer.dynamic.activations.method import METHODS, ActivationMethod, method
from gossamer.dynamic.activations.natural import natural_sparsity
from gossamer.dynamic.activations.orthogonal import orthogonal_columns
from gossamer.dynamic.activations.ppl_p import PplP, largest_sparsity, ppl_p
from gossamer.dynamic.activations.quantiles import Quantiles
from gossamer.dynamic.activations.sirius import Corrected, GatedSession, Sirius
from gossamer.dynamic.activations.sites import Site, linear_sites

__all__ = [
    "METHODS",
    "ActivationMethod",
    "AttachedGates",
    "Calibrated",
    "Corrected",
    "Gate",
    "GatedSession",
    "Gates",
    "PplP",
    "Quantiles",
    "Sirius",
    "Site",
    "calibrate",
    "greedy",
    "greedy_levels",
    "largest_sparsity",
    "linear_sites",
    "method",
    "natural_sparsity",
    "orthogonal_columns",
    "ppl_p",
    "settle",
]
