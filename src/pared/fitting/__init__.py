"""How `fit` decides: calibration, rounding, search."""
