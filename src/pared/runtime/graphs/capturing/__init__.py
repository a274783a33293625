"""Captures of calls: graphs of operators that change none of their inputs."""
