"""Recipes, methods and the loop that trains them. Called, it trains: :func:`rgbench.api.train`."""

import sys

from rgbench import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
