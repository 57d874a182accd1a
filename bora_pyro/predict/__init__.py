"""What a fitted model says of texts: the task, continuations, mixtures of draws, choices."""
