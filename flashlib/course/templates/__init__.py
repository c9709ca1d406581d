"""What the files of a new exercise begin as: `flashlib new-exercise`."""
