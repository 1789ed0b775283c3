"""Other low-rank updates: VeRA, Tied-LoRA, GLoRA."""
