"""Folders that `from_pretrained` of transformers opens."""
