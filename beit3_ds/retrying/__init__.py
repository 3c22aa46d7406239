"""Writes output even if writes fail temporarily: unwritten output is kept in memory and written later."""
