"""Methods that choose the codes of a quantised base, or fit an update to them: LoftQ, LQ-LoRA, QA-LoRA."""
