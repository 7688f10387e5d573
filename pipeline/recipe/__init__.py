"""Karpathy's recipe as a gate: one file a check, each with a verdict and the numbers behind it."""
