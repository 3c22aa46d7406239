"""What the operations use on a CPU."""
