"""int8 counterparts: modules that stand in for float ones, and the table of what they can stand in for."""

from pared.layers.activation import Activation
from pared.layers.counterpart import LAYERS, Counterpart, float_class, is_candidate, modes_of, stand_in

__all__ = ["LAYERS", "Activation", "Counterpart", "float_class", "is_candidate", "modes_of", "stand_in"]
