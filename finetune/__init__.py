"""The recipes: each reads top to bottom as the story of one kind of finetuning."""
