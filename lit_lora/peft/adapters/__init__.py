"""Small modules within or beside the blocks: bottleneck and residual adapters."""
