"""Exports, imports and inspects weights, including the formats of other projects."""
