"""From weights to codes: the rules, the rounding, and what each step would cost."""
