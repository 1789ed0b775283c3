"""``python -m lit_lora``: the command line where no ``lit-lora`` is on the path."""

from lit_lora.cli import main

if __name__ == "__main__":
    main()
