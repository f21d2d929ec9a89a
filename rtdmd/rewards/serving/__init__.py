"""Scorers in other processes: on this machine's CPU cores, or behind HTTP on any machine."""
