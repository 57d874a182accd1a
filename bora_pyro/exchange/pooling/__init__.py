"""Pooling of separately trained adapters: the hierarchical prior is applied to them after training."""
