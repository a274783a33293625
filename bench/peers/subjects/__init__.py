"""The models that all peers are given: one module each, with a `SUBJECT`."""

from __future__ import annotations

import importlib

from bench.peers.subjects.subject import Subject

NAMES = ("minilm", "mpnet", "efficientnet", "crepe_full", "textgenrnn", "dual_path", "whisper", "smollm2")


def find(name: str) -> Subject:
    """The subject of one of `NAMES`."""
    found: Subject = importlib.import_module(f"bench.peers.subjects.{name}").SUBJECT
    return found
