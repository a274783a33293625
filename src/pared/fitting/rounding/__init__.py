"""Rounding: what the rules decide for each tensor, what each step would cost, and weights rounded to codes."""
