"""Answers questions about images (VQAv2; paper section 3.1)."""
