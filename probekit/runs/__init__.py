"""Runs: a unit of work, a run's folder, and the engines that run units."""
