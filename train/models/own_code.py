"""Functions of one's own modules that make networks: run only after a user has named them on this machine.

A checkpoint or a recipe from elsewhere may name any function of any module; running it would be running foreign code.
So a name is used only if it was typed here before, for the same file: then it is in ``own_networks.json`` in the state
folder of the user.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from medseg_trt.errors import ArtefactError, InputError, UsageError
from medseg_trt.files import parse_json, read_limited, state_folder, write_json

NAMED = "own_networks.json"
MAX_BYTES = 1 << 20


def remember_own(name: str) -> None:
    """Allow a function "module:function" of the file that it is in now, because the user has typed its name.

    Raises:
        UsageError: there is no such module.
        InputError: the state folder cannot be written to.
    """
    file = str(_file_of(name))
    named = _named()
    if named.get(name) == file:
        return
    path = state_folder() / NAMED
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**named, name: file})
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; set XDG_STATE_HOME") from error


def own_function(name: str) -> Callable[..., Any]:
    """Import a function that the user has named.

    Raises:
        ArtefactError: nobody has named it on this machine, or it is in another file than then.
        UsageError: the module has no such function, or cannot be imported.
    """
    file = _file_of(name)
    if _named().get(name) != str(file):
        raise ArtefactError(
            f"{name} is code of {file}, which runs only if you have named it here. If you trust that file: "
            f"medseg-trt inspect arch:{name}"
        )
    module_name, _, function_name = name.partition(":")
    function = getattr(_import(module_name, file), function_name, None)
    if not callable(function):
        raise UsageError(f"{file} has no function {function_name!r}")
    return function


def _file_of(name: str) -> Path:
    """Return the file of a module: in the current folder, or as Python finds it."""
    module_name = name.partition(":")[0]
    local = Path(*module_name.split(".")).with_suffix(".py")
    if local.is_file():
        return local.resolve()
    first, *rest = module_name.split(".")
    try:
        # Of a module inside of a package, this would import the package.
        top = importlib.util.find_spec(first) if first != "__main__" else None
    except ValueError:  # a module that was not imported from a file
        top = None
    folders = [Path(folder) for folder in (top.submodule_search_locations or ())] if top is not None else []
    files = [folder.joinpath(*rest).with_suffix(".py") for folder in folders] if rest else []
    if not rest and top is not None and top.origin is not None and top.has_location:
        files = [Path(top.origin)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(
            f"there is no module {module_name} for the network {name}; run in the folder that holds {local}"
        )
    return file.resolve()


def _import(module_name: str, file: Path) -> ModuleType:
    loaded = sys.modules.get(module_name)
    if loaded is not None and loaded.__file__ is not None and Path(loaded.__file__).resolve() == file:
        return loaded
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None  # the file ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UsageError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    sys.modules[module_name] = module
    return module


def _named() -> dict[str, str]:
    path = state_folder() / NAMED
    if not path.is_file():
        return {}
    content = parse_json(path, read_limited(path, MAX_BYTES))
    if not (isinstance(content, dict) and all(isinstance(value, str) for value in content.values())):
        raise ArtefactError(f"{path} is damaged; remove it, and name your networks again: {json.dumps(content)[:80]}")
    return content
