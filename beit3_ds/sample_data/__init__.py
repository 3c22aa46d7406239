"""Small real data in the package: image-text pairs, labelled images and prose."""
