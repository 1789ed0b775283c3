"""Convert GGUF, .bin/.pth or LitGPT files to a checkpoint: ``lit-lora convert`` without the installed tool.

python scripts/convert.py SmolLM2-135M-Instruct.Q4_1.gguf --out checkpoints/smollm2
"""

from __future__ import annotations

import sys

from lit_lora.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
