"""Adapters as PEFT folders: written, read back, and pooled where they were trained apart."""
