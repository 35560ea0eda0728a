"""A small world with ground truth, in which the claim of the recipe is measured."""
