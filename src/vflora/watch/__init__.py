"""The page of a run that is still going on, served locally."""
