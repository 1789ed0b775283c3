"""Methods that train some of the numbers that are there: IA3, BitFit, full finetuning."""
