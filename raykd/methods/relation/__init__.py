"""Methods that survey section 1.3 names first: relation knowledge."""
