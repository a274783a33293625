"""all-MiniLM-L6-v2, 23 million weights."""

from __future__ import annotations

from examples import minilm

from bench.peers.subjects.embedding import embedder

SUBJECT = embedder("MiniLM", minilm, sizes=((8, 128), (1, 128), (1, 32)))
