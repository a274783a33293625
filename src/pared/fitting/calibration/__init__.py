"""What calibration calls say: the inputs of layers, and what an error of each weight costs."""
