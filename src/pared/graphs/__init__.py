"""A model's calls as graphs of operators, which run in place of its modules where that is faster."""

from pared.graphs.capture import Captures
from pared.graphs.halved import Halved, halved
from pared.graphs.served import Served, forward_of, release, serve, server_of
from pared.graphs.serving import Server, agree

__all__ = ["Captures", "Halved", "Served", "Server", "agree", "forward_of", "halved", "release", "serve", "server_of"]
