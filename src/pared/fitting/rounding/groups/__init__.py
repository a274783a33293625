"""Rounding with feedback on grids that have a step for each group of columns, as other runtimes execute them."""
