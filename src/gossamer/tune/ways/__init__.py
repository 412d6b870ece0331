"""Which weights of a checkpoint move, and how, one way a file; `full`, all of them, is TunedWeight."""
