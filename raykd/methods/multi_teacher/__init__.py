"""Methods that survey section 3.1 names first: several teachers."""
