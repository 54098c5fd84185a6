"""What the compilers make of every GPU kernel, on a machine without a GPU, and the record of it."""
