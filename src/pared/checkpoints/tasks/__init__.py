"""The work of `compress` as tasks of an executor."""
