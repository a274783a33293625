"""Files: opened safely, and written whole or not at all."""
