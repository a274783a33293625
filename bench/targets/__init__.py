"""Models in the formats of other runtimes: what solving on their grids is worth, at their bytes."""
