"""What chains the concepts: data, stages, run folders, rewards from outside, and the report."""
