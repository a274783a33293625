"""int8 counterparts: modules that stand in for float ones, and the table of what they can stand in for."""

from pared.layers.activation import Activation
from pared.layers.attention import leave_fast_paths, rejoin_fast_paths
from pared.layers.counterpart import Counterpart, restore, stand_in
from pared.layers.registry import Layer, float_class, has_columns, layer_of, weights_of
from pared.layers.table import LAYERS

__all__ = [
    "LAYERS",
    "Activation",
    "Counterpart",
    "Layer",
    "float_class",
    "has_columns",
    "layer_of",
    "leave_fast_paths",
    "rejoin_fast_paths",
    "restore",
    "stand_in",
    "weights_of",
]
