"""Safe reading and atomic writing: regular files, size limits, YAML, tensors and folder names."""
