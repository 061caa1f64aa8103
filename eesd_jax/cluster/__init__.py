"""Keeps the processes of one run together, and knows the machines that they are on."""
