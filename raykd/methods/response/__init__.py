"""Methods that survey section 1.1 names first: response knowledge."""
