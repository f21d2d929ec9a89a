"""Every random draw of a run as a function of (seed, stage, step, purpose, global sample index)."""

from rtdmd.randomness.draws import Draws

__all__ = ["Draws"]
