"""The target verifies: the loop, the target with its cache, acceptance, what is refused."""
