"""Code for other Python environments: the worker's end of the protocol, and one scorer a file.

The Python that runs these files has neither rgbench nor its dependencies: they import the standard library alone before
``load``, and keep to Python 3.8.
"""
