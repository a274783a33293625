"""all-mpnet-base-v2, 109 million weights."""

from __future__ import annotations

from bench.peers.subjects.embedding import embedder
from bench.zoo import mpnet

SUBJECT = embedder("mpnet", mpnet, sizes=((8, 128), (1, 128)))
