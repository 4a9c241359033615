"""Fault-tolerant inference fleets for RL training on Slurm."""
