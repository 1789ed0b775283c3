"""lit-lora: turn an open LLM into a specialist on the machine you have.

The package is built in floors; imports go down only (``tests/test_floors.py`` walks them):

    5  cli                                             the commands
    4  finetune  scripts                               the recipes, where model, method, data and loop meet
    3  recipe  merge  evaluate                         what recipes and commands share
    2  checkpoint  peft  data  train  generate         five neighbours that do not know each other
    1  model  tokenizer  hub                           the parts they are made of
    0  config  errors  log  files                      no torch
"""

__version__ = "0.1.0"
