"""Building the benchtop world from seeds: one file per stage, run in order by ``build``."""
