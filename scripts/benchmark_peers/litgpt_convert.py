"""Write LitGPT's own checkpoint of a Hugging Face folder: ``litgpt_convert.py SOURCE TARGET``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from litgpt.config import name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint


def main() -> None:
    """Link the weights into the target folder, and let LitGPT convert them there."""
    source, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.safetensors*"):
        (target / path.name).symlink_to(path)
    for path in source.glob("*.json"):
        if not path.name.endswith(".safetensors.index.json"):
            shutil.copy(path, target / path.name)
    name = next((known for known in name_to_config if known.lower() == source.name.lower()), source.name)
    convert_hf_checkpoint(target, model_name=name, dtype="bfloat16")


if __name__ == "__main__":
    main()
