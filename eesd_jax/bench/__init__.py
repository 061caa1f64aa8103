"""Runs benchmarks: measures controllers, keeps a journal, writes tables and plots."""
