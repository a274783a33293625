"""Runtimes whose files hold a captured call: what they execute, and numbers as they pack them."""
