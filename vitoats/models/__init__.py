"""What is inside a model: its inputs, the chain of its blocks, their linear layers, heads and neurons."""
