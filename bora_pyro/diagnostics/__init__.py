"""What a fit has learned, as ArviZ containers, tables and pictures: shrinkage, deviations, calibration, sweeps."""
