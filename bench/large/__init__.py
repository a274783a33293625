"""Models larger than memory: what a fit block by block takes."""
