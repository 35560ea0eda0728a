"""Training the identity projection head: settings, checkpoints, validation."""
