"""Federated fits: clients keep the documents of their tasks, and the server sees only tensors."""
