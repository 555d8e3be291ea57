"""Methods that survey section 1.2 names first: feature knowledge."""
