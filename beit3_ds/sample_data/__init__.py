"""Small real data that ships with the package: image-text pairs, labelled images and prose."""
