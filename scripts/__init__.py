"""Entry points to run without the command line tool, and the benchmark."""
