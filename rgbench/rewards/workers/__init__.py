"""What runs in another Python environment: the worker's side of the protocol, and one scorer per file.

These files import nothing of rgbench and nothing but the standard library before they are started, since they are run
by the Python of an environment that has neither rgbench nor its dependencies. They keep to Python 3.8.
"""
