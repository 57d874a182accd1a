"""Diagnostics of fits as ArviZ containers, tables and plots: shrinkage, deviations, calibration, sweeps over τ."""
