"""What compress and expand do with folders: the files beside the weights, the names of files, and several models."""
