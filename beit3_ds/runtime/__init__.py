"""Connects the ranks of a run, watches them and stops them."""
