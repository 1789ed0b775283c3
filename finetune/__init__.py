"""The recipes. Each one tells how one kind of finetuning works, top to bottom."""
