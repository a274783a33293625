"""What transformers asks to open a folder whose config.json says "pared": `from_pretrained` gives a quantized model.

transformers builds an empty model, lets a quantizer change it, reads the checkpoint into it, and lets the quantizer
finish. Here the empty model is set aside meanwhile, so that transformers finds nothing to read, and nothing to fill
with random numbers; at the end the very object that it made becomes the quantized model, as `pared.load` gives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pared.checkpoints.pretrained.folder import METHOD, check_note, note, weights_in, weights_name
from pared.errors import ConfigError

if TYPE_CHECKING:
    from pared.runtime.hugging_face.opening import Opening

_WHERE: Final = "from_pretrained"


@register_quantization_config(METHOD)
class Note(QuantizationConfigMixin):
    """What config.json says of the weights; see `checkpoints.pretrained.folder`."""

    def __init__(self, **found: Any) -> None:
        check_note(found)
        vars(self).update({**note(), **found})

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return dict(vars(self))


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Opens folders of ours. The methods are called in the order in which they stand here."""

    requires_calibration = True  # a float model is compressed by pared.fit, not while it is loaded

    def __init__(self, quantization_config: Note, **options: Any) -> None:
        if not options.get("pre_quantized", True):
            raise ConfigError(
                "the folder holds a float model, which is not quantized while it is loaded",
                where=_WHERE,
                remedy="Leave quantization_config out, and pass the model to pared.fit.",
            )
        super().__init__(quantization_config, **options)
        self._device: object = "cpu"
        self._dtype: Any = None
        self._opening: Opening

    def update_device_map(self, device_map: Any) -> None:
        """Note where the model is wanted; transformers places nothing.

        Raises:
            ConfigError: on several devices, or on the disk.
        """
        if isinstance(device_map, str) and device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
            device_map = {"": device_map}
        wanted = set(device_map.values()) if isinstance(device_map, dict) else set()
        if len(wanted) > 1 or {"disk", "meta"} & {str(one) for one in wanted}:
            raise ConfigError(
                f"device_map={device_map} divides the model, and a quantized model is in one place",
                where=_WHERE,
                remedy='Leave device_map out, or pass "auto" or "cpu": int8 kernels run on the CPU.',
            )
        self._device = next(iter(wanted), "cpu")

    def update_attn_implementation(self, config: Any) -> Any:
        """Say which file holds the weights; this method gets the configuration before that file is looked for."""
        config.transformers_weights = weights_name(self.quantization_config.to_dict())
        return config

    def update_dtype(self, dtype: Any) -> Any:
        """Note the type that is wanted; the empty model is made in it."""
        self._dtype = dtype
        return dtype

    def preprocess_model(self, model: Any, dtype: Any = None, **options: Any) -> None:  # noqa: ARG002  # transformers passes it
        """Set the empty model's modules aside.

        Raises:
            FileError: the artifact is missing.
            MismatchError: it is of another class.
        """
        from pared.runtime.hugging_face.opening import Opening  # only now: it takes a second

        name = weights_name(self.quantization_config.to_dict())
        self._opening = Opening(weights_in(options.get("checkpoint_files"), name), model)

    def postprocess_model(self, model: Any, **_options: Any) -> None:
        """Turn the object into the quantized model.

        Raises:
            CorruptError, FileError, UnsafeError, VersionError: the artifact cannot be read.
            MismatchError: it does not fit the configuration.
        """
        self._opening.finish(model, self.quantization_config.to_dict(), self._device, self._dtype)

    def is_serializable(self) -> bool:
        """A quantized model writes itself."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes cannot follow training."""
        return False
