"""Generation: sampling, streaming, chat sessions with a key/value cache."""
