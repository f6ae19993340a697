"""Machinery behind :mod:`pml_extras.functional`.

Hand-written derivatives, chunking, sparse matrices and autocast. Every kernel computes the same as
plain autograd in the parent package, which shows the equations.
"""
