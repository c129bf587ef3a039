"""What is learned: models, optimization, teachers."""
