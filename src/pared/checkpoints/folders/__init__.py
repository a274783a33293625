"""What compress and expand do with folders: the names of files, and one model in several forms."""
