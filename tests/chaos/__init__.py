"""Chaos on real Slurm: random faults for as long as wanted, and a checker that imports nothing of the product.

`python -m tests.chaos --help`, or `make chaos`; docs/testing.md tells more.
"""
