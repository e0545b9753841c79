"""Training: objectives, optimisers, the one loop, and its checkpoints."""
