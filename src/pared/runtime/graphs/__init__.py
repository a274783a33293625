"""A model's calls as graphs of operators, which run in place of its modules where that is faster."""
