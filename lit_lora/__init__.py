"""lit-lora: turn an open LLM into a specialist on the machine you have.

The package is built in floors. An import goes to a lower floor, or on one floor from the left of a ``>`` to its right;
names without a ``>`` between them do not know each other. ``tests/test_floors.py`` reads this table and enforces it;
``peft``, ``model`` and ``train`` each have a table of their own:

    5  __main__ scripts > cli                            entry points of a checkout; the commands
    4  finetune                                          the recipes, where model, method, data and loop meet
    3  classify compare > recipe evaluate merge > open estimate   shared by recipes and commands
    2  checkpoint  peft  data  train  generate           five neighbours that do not know each other
    1  wheel > model  tokenizer  hub  quantize > kernels   the parts they are made of
    0  config  files > log  errors                       no torch
"""

__all__ = ["IGNORE_INDEX", "__version__"]

__version__ = "0.1.0"

IGNORE_INDEX = -100
"""The label of a position that the loss ignores."""
