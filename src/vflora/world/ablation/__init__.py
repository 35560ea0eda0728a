"""The ablation: what each part of the recipe does, measured in the miniature world on characters held out."""
