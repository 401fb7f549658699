"""Training pairs of the four example adapters, written for this project.

Each module has `TRAIN`, a list of (prompt, answer), and `HELD_OUT`, prompts that are in no training pair.
"""
