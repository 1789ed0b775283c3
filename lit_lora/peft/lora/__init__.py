"""LoRA and its variants with other initializations, layers or lengths: DoRA, MultiLoRA, LongLoRA."""
