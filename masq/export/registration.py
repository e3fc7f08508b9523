"""Makes transformers know the ``masq`` quantization method, without importing it.

``import masq`` must stay light, and ``from_pretrained`` must work after it whichever of the two was imported first. So
where transformers' table of quantizers is loaded, the method is registered at once; otherwise a finder on
``sys.meta_path`` waits for that one module, registers right after it ran, and removes itself. Nothing of transformers
is replaced: both registrations are its public decorators.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers' table of quantizers is loaded, else as soon as it is."""
    table = sys.modules.get(_TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # The module registers itself when it is imported; if it is what brought transformers in, it is being imported now.
    importlib.import_module("masq.export.transformers_quantizer")


class _Finder(MetaPathFinder):
    """Finds ``transformers.quantizers.auto`` once, as the other finders do, to be told when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The loader of a module, with the registration after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
