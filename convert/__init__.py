"""Formats in and out: names of tensors and keys, GGUF writers and readers. Installed as `prosparse_pipe.convert`."""
