"""Methods that train a part of the model itself, or factors of it: IA3, BitFit, full finetuning."""
