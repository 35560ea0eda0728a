"""Teacher trajectories on disk: rolled out ahead, and trained from without the teacher."""
