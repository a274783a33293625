"""What one calibration says about a model: the measurements of the bench start from it, as `pared.fit` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pared import PostTrainingQuantConfig
from pared.fitting.calibration import observe, sensitivity
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.search.compressor import Compressor
from pared.model.calls import Calibration
from pared.model.tensors import ModelTensors, find_tensors
from pared.runtime.layers.table import check_registered

ALL_SAMPLES = 10**6  # the bench's calibration data are read whole


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model, its tensors, what they saw, and what their errors cost."""

    model: nn.Module
    model_tensors: ModelTensors[nn.Module]
    seen: Statistics
    sensitivity: Sensitivity

    @classmethod
    def on(cls, model: nn.Module, calibration: Calibration, seed: int = 0) -> Calibrated:
        check_registered(model)  # as `fit` does
        seen = observe.collect(model, calibration, ALL_SAMPLES)
        tensors = find_tensors(model)
        measured = sensitivity.measure(tensors, seen.calls, seen.energies, seed)
        assert measured is not None, "its outputs cannot be differentiated"
        return cls(model, tensors, seen, measured)

    def compressor(self, conf: PostTrainingQuantConfig | None = None) -> Compressor[Any]:
        conf = conf or PostTrainingQuantConfig(approach="weight_only")
        return Compressor(self.model_tensors, conf, self.seen, self.sensitivity)
