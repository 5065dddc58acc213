from types import ModuleType

from rgbench.api import Run as Run
from rgbench.api import evaluate as evaluate
from rgbench.api import headroom as headroom
from rgbench.api import plots as plots
from rgbench.api import report as report
from rgbench.api import results as results
from rgbench.api import train as train
from rgbench.api import verdict as verdict

__version__: str

class CallablePackage(ModuleType): ...
