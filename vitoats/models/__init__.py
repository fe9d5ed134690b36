"""Models by name, and the adapter that finds their blocks and linear layers."""
