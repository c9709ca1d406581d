"""Recorded results: figures with where they came from, what they depend on, and how they are shown."""
