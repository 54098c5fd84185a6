"""Choosing the entries of the kernels' tables: ranked without a GPU, measured on one, written back."""
