"""Every architecture of transformers that can be made small: does `pared` compress it, and what comes out?"""
