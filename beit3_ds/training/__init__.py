"""Trains a model for any task: loss, optimizer, engine, training loop, evaluation and reports."""
