"""A model's calls as graphs of operators, which replace its modules where that is faster."""
