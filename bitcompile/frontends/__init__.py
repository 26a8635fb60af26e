"""Front ends: what a model arrives as, to the portable form."""
