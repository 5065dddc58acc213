"""rgbench: reward-guided distillation of text-to-image models, trained, evaluated and compared.

Did the reward go up because the images got better, or because the student learned to
please the reward model? Start with ``rgbench --help``.
"""

__version__ = "0.1.0"
