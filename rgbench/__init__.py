"""rgbench: reward-guided distillation of text-to-image models, trained, evaluated and compared.

Did the reward go up because the images got better, or because the student learned to
please the reward model? Start with ``rgbench --help``, or from Python:

    import rgbench

    run = rgbench.train("rg_lcd", "train.steps=50")
    frame = rgbench.evaluate("teacher", run.path, metrics="hps,oracle", num=64)

The functions are those of :mod:`rgbench.api`; torch is imported when one is called.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "evaluate", "headroom", "plots", "report", "results", "train", "verdict"]
_PACKAGES = ("evaluate", "report", "train")  # of which functions have the names


class CallablePackage(ModuleType):
    """A package that can be called: as the function of :mod:`rgbench.api` that has its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        return getattr(import_module("rgbench.api"), self.__name__.rpartition(".")[2])


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
