"""``python -m rgbench``."""

from rgbench.cli import main

main()
