"""Several processes as one run: who is who, sharding, sequence parallelism, and noticing who is gone."""
