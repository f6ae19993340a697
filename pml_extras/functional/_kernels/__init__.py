"""Fast and memory-saving implementations behind :mod:`pml_extras.functional`.

Hand-written derivatives, chunking, sparse matrices and autocast live here. Every kernel computes
the same as a plain function of the parent package; nobody needs to open this package to understand
a method.
"""
