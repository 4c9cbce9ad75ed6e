"""How sharp are these models? `hf-ssam sharpness`, which also knows the examples' offline data sets by name.

    python examples/measure_sharpness.py runs/ssam runs/adamw                      # folders that the examples left
    python examples/measure_sharpness.py runs/ssam --data test.csv                 # or .json, a folder of images …
    python examples/measure_sharpness.py runs/ssam --measures eigenvalues --no_figures     # λ₁ alone: the cheapest

`--help` lists every flag; see `hf_ssam.cli.sharpness`.
"""

import support.run_data  # noqa: F401, enters the offline sets
from hf_ssam.cli.sharpness import main
from support.cli import run

if __name__ == "__main__":
    run(main)
