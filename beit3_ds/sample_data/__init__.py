"""Provides small sample data from public packages (image-text pairs, labelled images, prose), and synthetic scenes."""
