"""Who does the work: this process, or workers of a Ray cluster. What there is to do is said by the rooms below."""
