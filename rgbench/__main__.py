"""``python -m rgbench``."""

from rgbench.cli.main import main

main()
