"""Read and tokenize a dataset, and report what is in it: ``lit-lora prepare`` without the command line tool.

python scripts/prepare.py tickets_train --model checkpoints/smollm2 --show 3
"""

from __future__ import annotations

import sys

from lit_lora.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
