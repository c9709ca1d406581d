"""What is counted: bytes by operand, hardware counters, events of the processor, and every address that a kernel takes in the interpreter."""
