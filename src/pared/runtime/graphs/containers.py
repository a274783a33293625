"""Arguments that hold tensors: the caches of a model that generates text, and the outputs of its encoder.

A graph takes tensors. What such an argument is beside them is its `Layout`, a part of the call kind: the class, the
number of layers, and whether they are filled yet. Classes of transformers are known by name, and only while that
library is loaded, in the form that they have in its version 5; all others are left to the modules.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from torch.utils._pytree import tree_leaves

_MOST_LAYERS: Final = 1000
_CACHES: Final = "transformers.cache_utils"
_OUTPUTS: Final = "transformers.modeling_outputs"
_PAIR: Final = "EncoderDecoderCache"
_HALVES: Final = ("self_attention_cache", "cross_attention_cache")
# All that these objects hold. What holds more may do more than keep tensors.
_OF_CACHE: Final = {"layers", "layer_class_to_replicate", "offloading"}
_OF_LAYER: Final = ({"keys", "values", "is_initialized"}, {"keys", "values", "is_initialized", "dtype", "device"})
_OF_PAIR: Final = {*_HALVES, "is_updated"}
_PATTERN: Final = re.compile(
    r"DynamicCache\(([0-9]{1,4})(, filled)?(, growing)?\)"
    r"(?: \+ DynamicCache\(([0-9]{1,4})(, filled)?(, growing)?\))?|([A-Za-z]\w{0,99})\((\w{1,99}(?:, \w{1,99}){0,99})\)"
)


@dataclass(frozen=True)
class Half:
    """A cache of keys and values, layer by layer.

    Args:
        layers: how many there are.
        filled: whether all of them hold tensors, else none does.
        growing: whether layers are added as they are needed.
    """

    layers: int
    filled: bool
    growing: bool

    def __str__(self) -> str:
        """The text that `layout_from` reads."""
        marks = [mark for mark, is_so in (("filled", self.filled), ("growing", self.growing)) if is_so]
        return f"DynamicCache({', '.join([str(self.layers), *marks])})"


@dataclass(frozen=True)
class Layout:
    """What an argument is beside its tensors.

    Args:
        halves: the part for the text and that for the cross attention, if the cache has one; empty for an output.
        output: the name of the class of an output.
        fields: the names of the tensors of an output.
    """

    halves: tuple[Half, ...] = ()
    output: str = ""
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The text that `layout_from` reads.

        >>> print(Layout((Half(2, True, False),)), Layout(output="BaseModelOutput", fields=("x",)), sep="; ")
        DynamicCache(2, filled); BaseModelOutput(x)
        """
        return " + ".join(map(str, self.halves)) or f"{self.output}({', '.join(self.fields)})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors in it, in the order of `Container.tensors`."""
        if self.output:
            return self.fields
        return tuple(
            f"{part}.{layer}.{kind}"
            for part, half in zip(("own", "cross"), self.halves, strict=False)
            for layer in range(half.layers if half.filled else 0)
            for kind in ("keys", "values")
        )

    def made(self, tensors: Sequence[Any]) -> Any:
        """A new object with these tensors.

        Raises:
            LookupError: transformers is not loaded, or has no such class.
        """
        if self.output:
            return _output_class(self.output)(**dict(zip(self.fields, tensors, strict=True)))
        given = iter(tensors)
        caches = [_new_half(half) for half in self.halves]
        for cache, half in zip(caches, self.halves, strict=True):
            _fill(cache, half, given)
        if len(caches) == 1:
            return caches[0]
        pair = vars(sys.modules[_CACHES])[_PAIR](*caches)
        _tell_updated(pair, self.halves[1])
        return pair

    def put(self, cache: Any, tensors: Sequence[Any]) -> None:
        """Bring a cache, in place, to this layout with these tensors."""
        given = iter(tensors)
        halves = [getattr(cache, name) for name in _HALVES] if len(self.halves) > 1 else [cache]
        for one, half in zip(halves, self.halves, strict=True):
            _fill(one, half, given)
        if len(self.halves) > 1:
            _tell_updated(cache, self.halves[1])


def layout_from(text: str) -> Layout | None:
    """The inverse of `str`; None for anything else, such as what a strange file holds.

    >>> layout_from("DynamicCache(4, filled) + DynamicCache(4)").halves[1]
    Half(layers=4, filled=False, growing=False)
    >>> layout_from("DynamicCache(9999)"), layout_from("os.system(x)")
    (None, None)
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    own, cross, output, names = match[1], match[4], match[7], match[8]
    if output:
        fields = tuple(names.split(", "))
        return Layout(output=output, fields=fields) if len(set(fields)) == len(fields) else None
    halves = [Half(int(own), bool(match[2]), bool(match[3]))]
    halves += [Half(int(cross), bool(match[5]), bool(match[6]))] if cross else []
    return Layout(tuple(halves)) if all(half.layers <= _MOST_LAYERS for half in halves) else None


def is_filled(text: str) -> bool:
    """Whether a layout, as text, is that of a cache with something in it.

    >>> is_filled("DynamicCache(4, filled)"), is_filled("DynamicCache(4)"), is_filled("BaseModelOutput(x)")
    (True, False, False)
    """
    layout = layout_from(text)
    return layout is not None and any(half.filled for half in layout.halves)


@dataclass(frozen=True, eq=False)
class Container:
    """An argument or a result that holds tensors.

    Args:
        held: the caller's own object.
        layout: what it is beside its tensors, now.
        tensors: by their names in the layout, now.
    """

    held: Any
    layout: Layout
    tensors: Mapping[str, Any]

    @property
    def is_cache(self) -> bool:
        """Whether calls write to it."""
        return bool(self.layout.halves)

    def restore(self) -> None:
        """Give the cache what it held when this was made."""
        self.layout.put(self.held, list(self.tensors.values()))


def container_of(value: object) -> Container | None:
    """What an object of a known class holds; None for all other objects."""
    module = type(value).__module__
    if module == _CACHES:
        return _cache(value)
    if module == _OUTPUTS and isinstance(value, dict):
        names, found = tuple(value), list(value.values())
        if all(isinstance(one, Tensor) for one in found) and names and set(vars(value)) - set(_fields(value)) == set():
            layout = Layout(output=type(value).__name__, fields=names)
            return Container(value, layout, dict(zip(names, found, strict=True)))
    return None


def is_cache(value: object) -> bool:
    """Whether this is a cache with a known layout."""
    return type(value).__module__ == _CACHES and container_of(value) is not None


def leaves_of(output: object) -> list[Any]:
    """The leaves of an output, with the tensors in its caches."""
    found: list[Any] = []
    for leaf in tree_leaves(output, is_leaf=is_cache):
        held = container_of(leaf) if is_cache(leaf) else None
        found += [leaf] if held is None else list(held.tensors.values())
    return found


def renewed(value: Any) -> Any:
    """A cache of the same tensors, to which a call can write; anything else as it is."""
    held = container_of(value) if type(value).__module__ == _CACHES else None
    return value if held is None else held.layout.made(list(held.tensors.values()))


def _fields(value: Any) -> Sequence[str]:
    return list(getattr(type(value), "__dataclass_fields__", ()))


def _output_class(name: str) -> Any:
    found = vars(sys.modules[_OUTPUTS])[name]
    if not isinstance(found, type) or not issubclass(found, dict) or found.__module__ != _OUTPUTS:
        raise LookupError(f"{name} is not the class of an output")
    return found


def _cache(value: Any) -> Container | None:
    classes = vars(sys.modules[_CACHES])
    if type(value) is classes.get(_PAIR):
        if vars(value).keys() != _OF_PAIR:
            return None
        halves = [_half(vars(value)[name], classes) for name in _HALVES]
        own, cross = halves
        if own is None or cross is None or type(value.is_updated) is not dict:
            return None
        if [value.is_updated.get(i, False) for i in range(cross[0].layers)] != [cross[0].filled] * cross[0].layers:
            return None
        layout, tensors = Layout((own[0], cross[0])), own[1] + cross[1]
    else:
        found = _half(value, classes)
        if found is None:
            return None
        layout, tensors = Layout((found[0],)), found[1]
    return Container(value, layout, dict(zip(layout.names, tensors, strict=True)))


def _half(cache: Any, classes: Mapping[str, Any]) -> tuple[Half, list[Any]] | None:
    """A cache of one part, and its keys and values; None if it is of another class or holds anything else."""
    layer_class = classes.get("DynamicLayer")
    if layer_class is None or type(cache) is not classes.get("DynamicCache") or vars(cache).keys() != _OF_CACHE:
        return None
    known = vars(cache)
    layers, grows = known["layers"], known["layer_class_to_replicate"]
    if known["offloading"] or grows not in (None, layer_class) or not isinstance(layers, list):
        return None
    filled = bool(layers) and getattr(layers[0], "is_initialized", False)  # which layers of other classes may lack
    tensors: list[Any] = []
    for layer in layers:
        inner = vars(layer)
        if type(layer) is not layer_class or layer.is_initialized is not filled or inner.keys() != _OF_LAYER[filled]:
            return None
        if filled:
            tensors += (inner["keys"], inner["values"])
    if len(layers) > _MOST_LAYERS or not all(isinstance(one, Tensor) for one in tensors):
        return None
    return Half(len(layers), filled, grows is not None), tensors


def _new_half(half: Half) -> Any:
    """An empty cache."""
    classes = vars(sys.modules[_CACHES])
    cache = classes["DynamicCache"]()
    cache.layers = [classes["DynamicLayer"]() for _ in range(half.layers)]
    cache.layer_class_to_replicate = classes["DynamicLayer"] if half.growing else None
    return cache


def _fill(cache: Any, half: Half, tensors: Iterator[Any]) -> None:
    """Let a cache hold the next tensors, one for the keys and one for the values of each layer."""
    while len(cache.layers) < half.layers:
        cache.layers.append(cache.layer_class_to_replicate())
    for layer in cache.layers if half.filled else ():
        keys, values = next(tensors), next(tensors)
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


def _tell_updated(pair: Any, cross: Half) -> None:
    for index in range(cross.layers):
        pair.is_updated[index] = cross.filled
