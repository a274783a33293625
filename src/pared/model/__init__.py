"""The user's model, which is looked at and never changed, and the contents of its artifact."""

from typing import TYPE_CHECKING, NoReturn

from pared.errors import VersionError

if not TYPE_CHECKING:  # a checker would take every attribute for known

    def __getattr__(name: str) -> NoReturn:
        """Refuse the pickles of before 0.1: they name `pared.model._revive`, before the classes of its arguments."""
        if name == "_revive":
            raise VersionError(
                "a quantized model that an earlier version than 0.1 has pickled whole cannot be read",
                where="pared.model._revive",
                remedy="Load its artifact: pared.load(directory, model=build_model()). If there is none, open the "
                "pickle with the version that wrote it, and call save(directory).",
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
