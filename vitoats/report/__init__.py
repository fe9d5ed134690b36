"""Tables and plots for people to read."""
