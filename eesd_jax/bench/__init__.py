"""Benchmark runs: what is measured, their journal, tables and plots."""
