"""Loops for a CPU, compiled on the machine: what torch does in several passes over memory, or has no kernel for."""
