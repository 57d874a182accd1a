"""Exchange of adapters as PEFT folders: writing, reading, and pooling of adapters that were trained separately."""
