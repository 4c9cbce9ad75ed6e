"""Which rho to train with: `hf-ssam rho`, which also knows the examples' offline data sets by name.

    python examples/suggest_rho.py out/trec                                   # the data of the run that left it
    python examples/suggest_rho.py bert-base-uncased --data train.csv --method sam

`--help` lists every flag; see `hf_ssam.cli.rho`.
"""

import support.run_data  # noqa: F401, enters the offline sets
from hf_ssam.cli.rho import main
from support.cli import run

if __name__ == "__main__":
    run(main)
