"""The losses: ``kd_loss`` from checked arguments to row ops, their reference, and losses of output layers."""
