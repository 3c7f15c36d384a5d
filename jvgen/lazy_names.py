"""Public names of a package that are imported when they are first used, so that importing the package stays fast."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
      package: its `__name__`.
      modules: public name -> module that defines it, relative to jvgen; the name itself if it is a module.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"jvgen.{modules[name]}")
        return module if modules[name] == name else getattr(module, name)

    return get, lambda: sorted(modules)
