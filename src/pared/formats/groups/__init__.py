"""Grids whose steps belong to groups of columns, as other runtimes execute them."""
