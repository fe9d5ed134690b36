"""The structure of a model: its inputs, its chain of blocks, their linear layers, heads and neurons."""
