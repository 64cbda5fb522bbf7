"""Measuring: how fast kernels and memory of this machine are, which experts a text uses."""
