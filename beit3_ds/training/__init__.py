"""Trains any task: loss, optimizer, engine, loop, evaluation and reports."""
