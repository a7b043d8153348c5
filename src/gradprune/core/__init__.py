"""What all rooms stand on: checked arguments, the k largest exactly, what a weight is, what a step is."""
