"""Code for other Python environments: the worker's end of the protocol, and one scorer a file.

The Python that runs these files has neither rgbench nor its dependencies: they import the standard library alone before
``load``, and keep to Python 3.8. Nor do they import one another: each is a file that a user may copy, so all have their
own ``sha256_file``.
"""
