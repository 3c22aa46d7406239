"""Contains small data from public packages (image-text pairs, labelled images, prose), and draws synthetic scenes."""
