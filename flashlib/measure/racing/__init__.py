"""What is timed: contenders that take turns in cases, the machine they run on, and choices made by it."""
