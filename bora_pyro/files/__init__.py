"""Safe reading and atomic writing: regular files only, limits, YAML, tensors, names of folders."""
