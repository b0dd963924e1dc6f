"""Runs compared: numbers, words, reports and benchmarks."""
