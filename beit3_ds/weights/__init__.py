"""Exports, imports and inspects weights, also in the formats of other projects."""
