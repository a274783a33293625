"""The end of `fit`: what runs fastest and is accurate enough, and whether the file gives the same."""
