"""Choosing the entries of the kernels' tables of configurations: ranked without a GPU, measured on one, written back."""
