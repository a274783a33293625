"""What each refinement earns: files made with it and without it, as bytes at equal loss and seconds.

Refinements that the library has are switched off by other statistics or by patching a function for the time of one
series; those that it does not have exist only here.
"""
