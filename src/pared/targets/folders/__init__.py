"""Folders that loaders of Hugging Face's layout open: shards of safetensors, and configuration files beside them."""
