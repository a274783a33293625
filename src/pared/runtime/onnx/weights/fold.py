"""Batch normalization after a convolution, folded into the steps of its weight: the codes stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pared.formats.dtypes import Array
from pared.runtime.onnx.weights.layout import constant

_OUTPUTS: Final = {"Conv": 0, "ConvTranspose": 1}  # the weight's dimension that counts output channels


@dataclass(frozen=True, eq=False)
class Fold:
    """What a batch normalization does to the convolution before it.

    Args:
        node: the normalization, which is removed.
        scale: the factor of each output channel's steps; where it is negative, codes change their sign.
        bias: the convolution's new bias, float32 (output channels,).
    """

    node: Any
    scale: Array
    bias: Array

    def applied(self, codes: Array, steps: Array, convolution: Any) -> tuple[Array, Array]:
        """The codes and steps of the weight of both together."""
        axis = _OUTPUTS[convolution.op_type]
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        scale = self.scale.reshape(shape)
        return codes * np.sign(scale).astype(codes.dtype), (steps * np.abs(scale)).astype(np.float32)


def fold_of(uses: Sequence[tuple[Any, int]], codes: Array) -> Fold | None:
    """The normalization after the weight's only user, a convolution of one group, if nothing else reads its output."""
    if len(uses) != 1 or uses[0][1] != 1 or uses[0][0].op_type not in _OUTPUTS:
        return None
    node = uses[0][0]
    after = node.outputs[0].uses()
    if len(after) != 1 or node.outputs[0].is_graph_output():
        return None
    norm = next(iter(after)).node
    axis = _OUTPUTS[node.op_type]
    if norm.op_type != "BatchNormalization" or norm.inputs[0] is not node.outputs[0] or len(norm.outputs) != 1:
        return None
    found = [constant(value) for value in norm.inputs[1:5]]
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
    if bias is None or any(one is None for one in found):
        return None
    gain, shift, mean, variance = (one.astype(np.float64) for one in found if one is not None)
    if len(gain) != codes.shape[axis]:
        return None  # groups: a row of the weight is not an output channel
    epsilon = norm.attributes["epsilon"].value if "epsilon" in norm.attributes else 1e-5
    scale = gain / np.sqrt(variance + epsilon)
    if not scale.all():
        return None  # a step of zero would have no inverse in a runtime
    return Fold(norm, scale, ((bias - mean) * scale + shift).astype(np.float32))
