"""Kernels for CPUs, written in LLVM."""
