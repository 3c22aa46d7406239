"""Contains small real data: image-text pairs, labelled images and prose."""
