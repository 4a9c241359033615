"""The decision code, the takeover's rules and the trainer's reader, run for years against a cluster that is made up.

`run.run` plays one seed; see docs/simulation.md.
"""
