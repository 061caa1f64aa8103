"""The target and the exit branch as pure JAX: what they compute, and how their arrays are laid out."""
