"""What the loss is and what a validation measures, one file for each objective."""
