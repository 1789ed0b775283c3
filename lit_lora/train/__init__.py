"""The training loop, and what it is made of.

The rooms of this package, as in the table of ``lit_lora``:

    2  loop > step                                       the one loop, and one step of it
    1  run > validation state > config > objectives optim > cuda_graphs > loss   what a step asks
    0  run_log progress schedule signals device          what a run writes down and says; the rate; signals; memory
"""
