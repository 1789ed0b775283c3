"""LoRA and what is LoRA with another start, layer or length: DoRA, MultiLoRA, LongLoRA."""
