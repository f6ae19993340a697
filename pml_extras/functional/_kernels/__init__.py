"""Machinery behind :mod:`pml_extras.functional`.

Hand-written derivatives, chunking, sparse matrices and autocast. Each hand-written derivative
equals that of plain autograd in the parent package, which shows the equations.
"""
