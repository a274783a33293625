"""What a run of `fit` depends on, beside its records in a workspace."""
