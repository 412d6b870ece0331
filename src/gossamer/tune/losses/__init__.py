"""What a tuned model is drawn to: one loss a file, alone or together."""

from gossamer.tune.losses.loss import LOSSES, LogitLoss, Loss, StateLoss, loss

__all__ = ["LOSSES", "LogitLoss", "Loss", "StateLoss", "loss"]
