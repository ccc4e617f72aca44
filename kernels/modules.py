"""Modules of the CUDA driver, shared by the whole process: a PTX text is loaded once per CUDA context.

Every plugin of an engine launches through an adapter of its own; without sharing, each would load its kernel again. A
module is unloaded when the last adapter that uses it has given it back or is gone.
"""

import weakref
from collections.abc import Callable
from threading import Lock
from typing import Any

Key = tuple[int, int, str]  # the driver's bindings, the CUDA context, and the digest of the PTX


class LoadedModule:
    """A module as the driver knows it; whoever holds it keeps it loaded."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class ModuleCache:
    """Modules by context and PTX. It keeps none alive itself."""

    def __init__(self) -> None:
        self._modules: weakref.WeakValueDictionary[Key, LoadedModule] = weakref.WeakValueDictionary()
        self._lock = Lock()

    def get(self, key: Key, load: Callable[[], Any], unload: Callable[[Any], None]) -> LoadedModule:
        """Return a module, loaded where nobody has it.

        Args:
            key: bindings, context and digest.
            load: loads it and returns the driver's handle.
            unload: is called with the handle when nobody holds the module any more, in whatever thread that is. At the
                end of the process nothing is unloaded: the driver may be gone by then.
        """
        with self._lock:
            module = self._modules.get(key)
            if module is None:
                module = LoadedModule(load())
                weakref.finalize(module, unload, module.handle).atexit = False
                self._modules[key] = module
            return module


MODULES = ModuleCache()
