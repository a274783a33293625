"""Caches of keys and values that stay in OpenVINO from one call to the next."""
