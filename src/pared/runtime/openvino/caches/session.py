"""Runs a graph that keeps caches; callers have theirs, too, as views of memory with room for what comes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from pared.runtime.onnx.engines import OpenVinoSession
from pared.runtime.openvino.caches.inside import ORDER, Inside

_MOST_TEXTS: Final = 4  # that are kept while other calls come between; the memory of each is that of its cache
_LEAST_ROOM: Final = 64  # tokens
_ROOM: Final = 0.5  # as a share of the tokens that are there


class CachedSession(OpenVinoSession):
    """A model that keeps its caches, compiled by OpenVINO; several threads may run it at once.

    If a call brings the very tensors that the last one gave, and nobody wrote to them, the state is theirs, and only
    what is new is computed and written. Any other cache, such as one that was cropped or reordered, is copied first.

    Args:
        model: from `kept_inside`; or what `compiled` gave, for the same number of threads.
        threads: how many one run may take.
        inside: which numbers it keeps.
    """

    def __init__(self, model: Any, threads: int, inside: Inside) -> None:
        super().__init__(model, threads, {"KV_CACHE_PRECISION": "f32"})
        self._inside, self._names = inside, frozenset(inside.names)
        self._texts: list[_Texts] = []  # those that no thread is using, the latest last
        self._lock = threading.Lock()

    def known(self, inputs: Mapping[str, Tensor]) -> frozenset[str]:
        """The names of a cache that it gave."""
        past = [inputs[name] for name in self._inside.names]
        with self._lock:
            return self._names if any(texts.hold(past) for texts in self._texts) else frozenset()

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of the graph as it was, for inputs on the CPU by their names."""
        past = [inputs[name] for name in self._inside.names]
        texts = self._claimed(past)
        others = {name: tensor for name, tensor in inputs.items() if name not in self._names}
        others[ORDER] = torch.arange(past[0].shape[0], dtype=torch.int32)
        try:
            if not texts.hold(past):
                texts.load(past)
            *left, new = self._answer(texts.request, others)
            every = [*left, *texts.grown(new)]
        except BaseException:
            texts.forget()  # whatever the state is now
            raise
        finally:
            with self._lock:
                self._texts.append(texts)
        return [every[place] for place in self._inside.places]

    def _claimed(self, past: Sequence[Tensor]) -> _Texts:
        """The state of these tensors; else one that nobody needs."""
        with self._lock:
            for wanted in (lambda one: one.hold(past), lambda one: one.room is None):
                for place, one in enumerate(self._texts):
                    if wanted(one):
                        return self._texts.pop(place)
            if len(self._texts) >= _MOST_TEXTS:
                return self._texts.pop(0)
        return _Texts(self._compiled.create_infer_request(), self._inside.names, self._tensor)

    def _idle(self) -> list[Any]:
        return [texts.request for texts in self._texts]


class _Texts:
    """The state of a request of OpenVINO, and the tensors of the caller's cache that are equal to it.

    Attributes:
        request: the request.
        room: float32 (tensors, texts, heads, tokens and more, features), of which the caller has views; None if the
            caller has none any more.
    """

    def __init__(self, request: Any, names: Sequence[str], tensor: Any) -> None:
        self.request = request
        self.room: Tensor | None = None
        states = {state.name: state for state in request.query_state()}
        self._states = [states[name] for name in names]
        self._tensor = tensor
        self._views: list[weakref.ref[Tensor]] = []  # at the last call
        self._version, self._is_finite = 0, True
        self._tokens = 0

    def hold(self, past: Sequence[Tensor]) -> bool:
        """Whether these very tensors are what the state is equal to; they are finite, and nobody wrote to them."""
        room = self.room
        if room is None or not self._views or room._version != self._version or not self._is_finite:
            return False
        return all(view() is tensor for view, tensor in zip(self._views, past, strict=True))

    def load(self, past: Sequence[Tensor]) -> None:
        """Make the state equal to these tensors."""
        for state, tensor in zip(self._states, past, strict=True):
            state.state = self._tensor(tensor.detach().contiguous().numpy())
        self.room, self._tokens, self._views = None, 0, []
        self._join(torch.stack([tensor.detach() for tensor in past]))

    def grown(self, new: Tensor) -> Sequence[Tensor]:
        """The tensors of the cache after a call.

        Args:
            new: what was joined to them, float32 (tensors, texts, heads, new tokens, features).
        """
        room = self._join(new)
        self._is_finite = bool(torch.linalg.vector_norm(new).isfinite())
        with torch.inference_mode(mode=False):  # torch counts who writes to these
            views = room.narrow(3, 0, self._tokens).unbind()
        self._views = [weakref.ref(views[0], self._dropped), *map(weakref.ref, views[1:])]
        self._version = room._version
        return views

    def forget(self) -> None:
        """Be equal to nothing."""
        self.room = None

    def _join(self, new: Tensor) -> Tensor:
        """Write numbers behind those that are there."""
        begin, end = self._tokens, self._tokens + new.shape[3]
        room = self.room
        with torch.inference_mode(mode=False), torch.no_grad():
            if room is None or end > room.shape[3]:
                most = end + max(_LEAST_ROOM, int(_ROOM * end))
                wider = torch.empty((*new.shape[:3], most, new.shape[4]), dtype=new.dtype)
                if room is not None:
                    wider.narrow(3, 0, begin).copy_(room.narrow(3, 0, begin))
                room = wider
            room.narrow(3, begin, end - begin).copy_(new)
        self.room, self._tokens = room, end
        return room

    def _dropped(self, view: weakref.ref[Tensor]) -> None:
        if self._views and self._views[0] is view:  # and not that of an earlier call
            self.room = None
