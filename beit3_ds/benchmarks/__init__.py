"""Contains the benchmarks of `beit3 bench` and the checks of `beit3 certify`. BENCHMARKS.md lists the results."""
