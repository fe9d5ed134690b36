"""How a model's budget is split over its layers: every allocator returns budgets by layer name."""
