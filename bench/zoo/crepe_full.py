"""CREPE full, 46 times the weights of tiny, on the same tones, of which it hears fewer frames: it takes so much longer.

It hears 4 frames of each of the 60 tones that are scored (tiny: 201), and of 15 others to calibrate.
"""

from __future__ import annotations

from bench.zoo import crepe

FULL = crepe.Capacity("full", times=8, every=50, calibration_tones=15, batch=20)

PAIR = crepe.pair(FULL)
