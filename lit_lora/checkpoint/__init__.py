"""Checkpoints: Hugging Face folders read and written tensor by tensor, and the formats that convert into them."""
