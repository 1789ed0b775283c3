"""Methods that choose the codes of a quantized base, or fit their update to them: LoftQ, LQ-LoRA, QA-LoRA."""
