"""How a model's budget is split over its layers: every allocator gives budgets by layer name."""
