"""The command line: each command parses its options, makes one call and prints the result."""

from pared.cli import evaluating, fitting, stored
from pared.cli.app import app, main

__all__ = ["app", "evaluating", "fitting", "main", "stored"]
