"""A model's calls as graphs of operators, which run in place of its modules where that is faster."""

from pared.graphs.halved import Halved, halved
from pared.graphs.serving import Server, agree

__all__ = ["Halved", "Server", "agree", "halved"]
