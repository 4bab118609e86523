"""Before and beside serving: warm start, alignment with a target that is fine-tuned."""
