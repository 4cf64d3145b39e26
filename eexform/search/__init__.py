"""Space, scorers, NSGA-II, front and run of a search; and, called, the search itself.

``ee.search(...)`` is :func:`eexform.search.driver.search`. Importing any module of a package binds the package to its
name in the parent, so from the first import on ``eexform.search`` is this package and not the function: the package can
be called.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from eexform.search.driver import search

        return search(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        from eexform.search.driver import search

        return inspect.signature(search)


sys.modules[__name__].__class__ = _Package
