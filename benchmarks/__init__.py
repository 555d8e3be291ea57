"""What raykd costs, as ratios measured in one run: `python -m benchmarks --help`, `make bench`, docs/benchmarks.md."""
