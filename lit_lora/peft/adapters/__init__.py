"""Small modules within or parallel to the blocks: bottleneck and residual adapters."""
